"""Child processes of a test that start in milliseconds, because their parent has imported everything."""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def fork(act: Callable[[], None], log: Path) -> int:
    """Run `act` in a child process whose output goes to a file; returns its process number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork beside threads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115, for the rest of its life
        torch.set_num_threads(1)  # the parent's threads are not in the child
        act()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException as error:
        traceback.print_exc()
        code = int(getattr(error, "exit_code", 1))
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, -n for signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def team(size: int, act: Callable[[int], None], folder: Path) -> list[int]:
    """Run `act(rank)` in so many processes that torch.distributed can connect; returns their exit codes.

    What rank 0 prints lies in `folder/output-0.log`, and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        act(rank)

    children = [fork(lambda rank=rank: start(rank), folder / f"output-{rank}.log") for rank in range(size)]
    return [wait(child) for child in children]


def output(folder: Path, rank: int = 0) -> str:
    """What a process of a team printed."""
    return (folder / f"output-{rank}.log").read_text()


KILLED = 9


def killed_at(event: int, run: Path, act: Callable[[], None]) -> bool:
    """Run `act` in a child process that dies at its n-th file operation in `run`; whether it got that far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        seen = 0

        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if name.startswith(("open", "os.", "shutil.")) and any(str(run) in str(a) for a in arguments[:2]):
                seen += 1
                if seen == event:
                    os._exit(KILLED)

        try:
            sys.addaudithook(hook)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED
