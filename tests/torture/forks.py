"""Real runs in child processes of one that has imported everything, so that a hundred of them take minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import fork, wait
from inlay.config_loading import load
from inlay.train.evaluate import Evaluator
from inlay.train.loop import Loop
from inlay.train.run import train


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

    def start(self, run: Path, kind: str = "all", kill_at: int = 0) -> int:
        """The same in a child process, which kills itself at its n-th event of a kind ("file", "pass" or "all")."""

        def counted() -> None:
            seen = Events(run, kind, kill_at)
            try:
                self.go(run)
            finally:
                seen.write(self.folder / "events.json")

        return fork(counted, self.log)

    def whole(self, name: str) -> tuple[Path, dict[str, int]]:
        """One run without interruption, and how many events of each kind it had."""
        run = self.folder / name
        assert wait(self.start(run)) == 0, self.log.read_text()
        return run, json.loads((self.folder / "events.json").read_text())


class Events:
    """Counts what a run does: file operations in its folder, and forward passes in training and evaluation.

    Moments are counted and not timed, so that a busy machine has the same kills as an idle one.
    """

    def __init__(self, run: Path, kind: str, kill_at: int) -> None:
        self.run, self.kind, self.kill_at = str(run), kind, kill_at
        self.seen = {"file": 0, "pass": 0, "all": 0}
        sys.addaudithook(self._audit)
        for owner, name in ((Loop, "_backward"), (Evaluator, "_forward")):
            setattr(owner, name, self._counting(getattr(owner, name)))

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name.startswith(("open", "os.", "shutil.")) and any(self.run in str(a) for a in arguments[:2]):
            self._count("file")

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._count("pass")
            return real(*args, **kwargs)

        return call

    def _count(self, kind: str) -> None:
        for each in (kind, "all"):
            self.seen[each] += 1
            if each == self.kind and self.seen[each] == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path: Path) -> None:
        """Keep the counts."""
        path.write_text(json.dumps(self.seen))


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
