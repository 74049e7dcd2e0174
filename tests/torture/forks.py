"""Real runs in child processes of one that has imported everything, so that a hundred of them take minutes."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

from children import fork, wait
from inlay.config_loading import load
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
