"""Where the numbers of a run go: `metrics.jsonl` always, other trackers only when asked for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from inlay.errors import ConfigError
from inlay.folders import append_text

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """What a tracker can do."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record: `step`, and numbers by name."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines:
    """`metrics.jsonl`: one JSON object per line, on disk when `log` returns, except when the disk is full.

    A line that cannot be written is kept and tried again with the next one, so that a full disk does not end a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self.failure: OSError | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self.waiting.append(json.dumps(dict(record)) + "\n")
        try:
            append_text(self.path, "".join(self.waiting))
        except OSError as error:
            self.failure = error
        else:
            self.waiting, self.failure = [], None

    def close(self) -> None:
        """Raise what kept the last lines from being written."""
        if self.failure is not None:
            raise self.failure


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir`."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run))
        self.writer.add_text("config", json.dumps(config, indent=1))

    def log(self, record: Mapping[str, Any]) -> None:
        """Write each number as a scalar."""
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out the rest."""
        self.writer.close()


class Wandb:
    """Weights & Biases, or Trackio, which has the same calls."""

    def __init__(self, module: str, run: Path, config: Mapping[str, Any]) -> None:
        self.api = importlib.import_module(module)
        self.api.init(project="inlay", name=run.name, config=dict(config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers at their step."""
        self.api.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """End the run there."""
        self.api.finish()


class MLflow:
    """An MLflow run; where it is kept is MLflow's own setting."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self.api = mlflow
        mlflow.set_experiment("inlay")
        mlflow.start_run(run_name=run.name)
        mlflow.log_params({key: str(value)[:500] for key, value in config.items()})

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers at their step."""
        self.api.log_metrics(_numbers(record), step=record["step"])

    def close(self) -> None:
        """End the run there."""
        self.api.end_run()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    part = str(record.get("split", "train"))
    return {
        f"{part}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def check(report_to: Sequence[str]) -> None:
    """Raise a ConfigError for a tracker whose package is absent, before anything is loaded."""
    absent = [name for name in report_to if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None]
    if absent:
        extras = ",".join(absent)
        raise ConfigError(f"report_to: {', '.join(absent)} is not installed; pip install 'inlay[{extras}]'")


def open_trackers(report_to: Sequence[str], run: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """`metrics.jsonl` and every tracker named."""
    opened: list[Tracker] = [JsonLines(run / "metrics.jsonl")]
    for name in report_to:
        if name == "tensorboard":
            opened.append(TensorBoard(run, config))
        elif name in ("trackio", "wandb"):
            opened.append(Wandb(name, run, config))
        elif name == "mlflow":
            opened.append(MLflow(run, config))
    return opened
