"""One run of a comparison: trained by `inlay.train`, measured, and kept as one JSON file once it is whole."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inlay.compare.costs import PeakMemory, inference
from inlay.compare.plan import Cell, Plan
from inlay.config import RunConfig
from inlay.errors import ConfigError, MethodError, SiteError, TrainingError
from inlay.folders import read_json, remove, replace_text
from inlay.train import runfolder
from inlay.train.checkpoint import Interrupted
from inlay.train.defaults import defaults, width_of
from inlay.train.metrics import MAIN
from inlay.train.report import read_log

_PLACE = ("output_dir", "resume")


@dataclass
class Record:
    """Everything that one run came to. Times are in seconds, inference in milliseconds, memory in bytes.

    With `together` the run was one of several in a pass, and time and memory are those of a few steps of it alone.
    `error` holds the reason where the method cannot be used on this model or its training failed; nothing else is
    known then.
    """

    label: str
    key: str
    size: int | None
    seed: int
    config: dict[str, Any]
    error: str = ""
    task: str = ""
    metric: str = ""
    method: str = ""
    source: str = ""
    learning_rate: float = 0.0
    batch: int = 0
    rows: int = 0
    held_out: int = 0
    quality: dict[str, float] = field(default_factory=dict)
    untouched: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    loss: list[tuple[int, float]] = field(default_factory=list)
    trained: int = 0
    stored: int = 0
    head: int = 0
    base: int = 0
    width: int | None = None
    bytes: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    inference: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    together: bool = False

    @property
    def value(self) -> float:
        """The task's main metric on the held-out rows after the last step."""
        return self.quality[self.metric]

    @property
    def step(self) -> float:
        """Median seconds of an optimizer step."""
        return statistics.median(self.step_seconds) if self.step_seconds else self.seconds / max(self.steps, 1)


@dataclass(frozen=True)
class Costs:
    """What a few steps of a variant alone took."""

    trained: int
    peak_bytes: int | None
    step_seconds: list[float]


def folder_of(plan: Plan, cell: Cell) -> Path:
    """The run folder of a cell while it is worked on."""
    return plan.output / "work" / cell.name


def path_of_costs(plan: Plan, cell: Cell) -> Path:
    """Where the costs of the cell's variant lie, if they were measured apart."""
    return plan.output / "costs" / f"{plan.timed(cell).name}.json"


def path_of(plan: Plan, cell: Cell) -> Path:
    """Where a cell's record lies."""
    return plan.output / "cells" / f"{cell.name}.json"


def read(plan: Plan, cell: Cell, data: str | list[str]) -> Record | None:
    """The record of a finished cell, or None.

    Raises:
        ConfigError: the folder holds this cell as run with other settings.
    """
    path = path_of(plan, cell)
    if not path.exists():
        return None
    record = Record(**read_json(path))
    record.curve, record.loss = ([(int(x), float(y)) for x, y in points] for points in (record.curve, record.loss))
    config = plan.config(cell, data)
    changes = differences(record.config, config)
    if not record.error and config.learning_rate is None:
        rate = defaults(cell.variant.method, record.task, record.width).learning_rate
        if rate != record.learning_rate:
            changes = f"the default learning_rate was {record.learning_rate:g}, is {rate:g}"
    if changes:
        raise ConfigError(
            f"output_dir: {plan.output} holds {cell.name} as run with other settings ({changes}). Name another folder, "
            f"or delete {path} to run it anew"
        )
    return record


def comparable(config: RunConfig) -> dict[str, Any]:
    """What decides a cell's result, as JSON gives it back."""
    values: dict[str, Any] = json.loads(json.dumps(config.model_dump()))
    return {key: value for key, value in values.items() if key not in _PLACE}


def differences(before: Mapping[str, Any], config: RunConfig) -> str:
    """`key was x, is y` for every setting that differs; one that was not known then had its default."""
    wanted = comparable(config)
    usual = {
        key: field.get_default(call_default_factory=True, validated_data={})
        for key, field in RunConfig.model_fields.items()
    }
    then = {key: before.get(key, usual.get(key)) for key in wanted} | dict(before)
    other = sorted(key for key in then if wanted.get(key) != then[key])
    return ", ".join(f"{key} was {then[key]!r}, is {wanted.get(key)!r}" for key in other)


def run(plan: Plan, cell: Cell, data: str | list[str]) -> Record:
    """Train and measure one cell, and write its record. An interrupted one goes on from its checkpoint.

    A method that this model has no place for, and a run that fails, are a record too, with the reason.

    Raises:
        Interrupted: a signal came; the run's checkpoint is on disk.
        DataError, ConfigError: see `inlay.train.run.train`.
    """
    folder = folder_of(plan, cell)
    config = plan.config(cell, data)
    record = Record(cell.variant.label, cell.variant.key, cell.size, cell.seed, comparable(config))
    try:
        apart = path_of_costs(plan, cell)
        costs = Costs(**read_json(apart)) if plan.together and apart.exists() else None
        measured = plan.times_inference(cell)
        _train_and_measure(record, config, folder, costs, measure_inference=measured, pictures=plan.keep_runs)
    except (MethodError, SiteError, TrainingError) as error:
        record = Record(cell.variant.label, cell.variant.key, cell.size, cell.seed, comparable(config), str(error))
    except Interrupted as error:
        what = str(error).partition(". Go on")[0]
        raise Interrupted(f"{cell.name}: {what}. The same command goes on from there", error.exit_code - 128) from None
    path = path_of(plan, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    if plan.keep_runs and not record.error:
        kept = plan.output / "runs" / cell.name
        remove(kept)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, kept)
    replace_text(path, json.dumps(asdict(record), indent=1))
    remove(folder)
    return record


def _train_and_measure(
    record: Record, config: RunConfig, folder: Path, costs: Costs | None, *, measure_inference: bool, pictures: bool
) -> None:
    from inlay.describe import base_parameters
    from inlay.train.run import train
    from inlay.train.trained import open_trained

    record.together = costs is not None and (folder / "results.json").exists()
    if not record.together:
        going_on = (folder / runfolder.MARK).exists()
        if folder.exists() and not going_on:
            shutil.rmtree(folder)
        config = config.model_copy(update={"output_dir": str(folder), "resume": str(folder) if going_on else False})
        with PeakMemory() as peak:
            result = train(config, quiet=True, pictures=pictures)
        record.trained, record.peak_bytes = result.trained_parameters, peak.bytes
    resolved, facts = runfolder.read_config(folder), read_json(folder / "data.json")
    record.task, record.metric = str(resolved.task), resolved.metric_for_best_model or MAIN[str(resolved.task)]
    record.learning_rate, record.batch = resolved.learning_rate or 0.0, resolved.per_device_train_batch_size or 0
    record.rows, record.held_out = facts["train"], sum(facts["held_out"].values())
    log, results = read_log(folder), read_json(folder / "results.json")
    if not record.held_out:
        raise ConfigError("compare: nothing is held out to measure quality on; set eval_data or eval_fraction")
    record.untouched = results.get("untouched", {})
    record.quality = next(values for name, values in results.items() if name not in ("untouched", "head only"))
    if record.metric not in record.quality:
        raise ConfigError(f"metric_for_best_model: {record.metric!r} is not measured; there are {list(record.quality)}")
    record.bytes = runfolder.bytes_of(folder / "adapter")
    last = [line for line in log if line["split"] == "train"][-1]
    record.steps, record.tokens, record.seconds = last["step"], last["tokens"], last["seconds"]
    _curves(record, log)
    if costs is not None:
        record.trained, record.peak_bytes, record.step_seconds = costs.trained, costs.peak_bytes, costs.step_seconds
    trained = open_trained(folder)
    adapter = trained.adapter
    record.width = width_of(trained.model.config)
    record.method, record.source = repr(adapter.method), _source(adapter)
    record.stored, record.head, record.base = (
        adapter.stored_parameters, adapter.head_parameters, base_parameters(trained.model)
    )  # fmt: skip
    env = json.loads((folder / "env.json").read_text())[-1]
    record.environment = {key: env[key] for key in ("python", "torch", "inlay", "processor", "threads", "accelerators")}
    record.environment |= {"device": str(trained.device), "precision": "bf16" if resolved.bf16 else "float32"}
    if measure_inference:
        record.inference = inference(trained)


def _curves(record: Record, log: list[dict[str, Any]]) -> None:
    """Loss and quality by step, and the seconds of single steps."""
    record.step_seconds = steps_of(log)
    held_out = next((line["split"] for line in log if line["split"] != "train"), None)
    for line in log:
        if line["split"] == "train":
            record.loss.append((line["step"], line["loss"]))
        elif line["split"] == held_out and record.metric in line:
            record.curve.append((line["step"], line[record.metric]))


def steps_of(log: list[dict[str, Any]]) -> list[float]:
    """Seconds of a step, for each line about training."""
    before: Mapping[str, Any] = {"step": 0, "seconds": 0.0}
    found = []
    for line in (line for line in log if line["split"] == "train"):
        found.append((line["seconds"] - before["seconds"]) / max(line["step"] - before["step"], 1))
        before = line
    return found


def _source(adapter: Any) -> str:
    import re

    import inlay

    numbers = re.findall(r"eprint=\{([\d.]+)\}", inlay.citation(adapter))
    return ", ".join(f"arXiv:{number}" for number in numbers)
