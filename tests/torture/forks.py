"""Real runs in child processes of one that has imported everything, so that a hundred of them take minutes."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inlay.config_loading import load
from inlay.train.run import train


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
        act()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException as error:
        traceback.print_exc()
        code = int(getattr(error, "exit_code", 1))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, -n for signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class World:
    """A base, data, and settings of one run that is started again and again.

    Args:
        folder: where everything lies.
        settings: keys of the run configuration.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.log = folder / "output.log"

    def go(self, run: Path) -> None:
        """What a user does who wants the run done: start it, or go on with it."""
        os.environ["INLAY_CACHE"] = str(run.with_name(f"{run.name}-cache"))
        if (run / "config.yaml").exists():
            config = load(run / "config.yaml", [], {"resume": str(run)})
        else:
            config = load(None, [], self.settings | {"output_dir": str(run)})
        train(config, quiet=True)

    def start(self, run: Path) -> int:
        """The same in a child process."""
        return fork(lambda: self.go(run), self.log)

    def whole(self, name: str) -> tuple[Path, float]:
        """One run without interruption, and the seconds that it took."""
        run = self.folder / name
        began = time.monotonic()
        assert wait(self.start(run)) == 0, self.log.read_text()
        return run, time.monotonic() - began


def contents(run: Path) -> dict[str, Any]:
    """Everything that a run leaves and that must not depend on how often it was interrupted."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run / name).exists():
            lines = map(json.loads, (run / name).read_text().splitlines())
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    found["results"] = json.loads((run / "results.json").read_text())
    found["folders"] = sorted(path.name for path in run.iterdir() if path.is_dir())
    return found


def remove(run: Path) -> None:
    """Forget a run and its cache."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run.with_name(f"{run.name}-cache"), ignore_errors=True)


def moment(choose: random.Random, seconds: float) -> float:
    """A random moment of a run of so many seconds."""
    return choose.uniform(0.0, seconds)
