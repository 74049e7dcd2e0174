"""The run folder: where it is, what lies in it, and how a later command finds its way back into it.

config.yaml      the configuration as it was resolved
data.json        what was found in the data: task, format, columns, labels, counts
env.json         one entry per start: machine, software, arguments
metrics.jsonl    every logged number
samples.jsonl    texts generated at each evaluation
loss.png         the curves
ranks.json .png  where AdaLoRA spent its budget; gates.json .png: how far UniPELT's gates are open
adapter/         the result: the best adapter, or the last one
best/            the best adapter so far
checkpoint-N/    to continue from
README.md        the model card
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay import folders
from inlay._version import __version__
from inlay.config import RunConfig
from inlay.config_loading import dump, load
from inlay.errors import CheckpointError, ConfigError
from inlay.train import checkpoint

if TYPE_CHECKING:
    from inlay.data import Prepared

MARK = "config.yaml"


def place(config: RunConfig, method: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to continue from, if any. Creates nothing.

    Raises:
        ConfigError: the folder holds a run and `resume` is off; or it holds other things.
        CheckpointError: there is no complete checkpoint to continue from.
    """
    if config.resume:
        return _resumed(config)
    if config.output_dir is None:
        wanted = default_folder(config, _slug(method))
        run, number = wanted, 1
        while run.exists():
            number += 1
            run = wanted.with_name(f"{wanted.name}-{number}")
        return run, None
    run = Path(config.output_dir)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output_dir: {run} is a file")
    if (run / MARK).exists() or (run.is_dir() and checkpoint.candidates(run)):
        raise ConfigError(f"output_dir: {run} holds a run; go on with it by --resume {run}, or name another folder")
    if folders.holds_something(run):
        raise ConfigError(f"output_dir: {run} is not empty and holds no run; name another folder")
    return run, None


def default_folder(config: RunConfig, last: str) -> Path:
    """Where a run lies that was given no folder: `runs/<model>-<data>-<last>`."""
    return Path("runs") / f"{_slug(config.model)}-{_slug(_first(config.data))}-{last}"


def _resumed(config: RunConfig) -> tuple[Path, Path | None]:
    named = Path(config.resume) if isinstance(config.resume, str) else Path(config.output_dir or "")
    if config.resume is True and config.output_dir is None:
        raise ConfigError("resume: name the run folder, as in --resume runs/name")
    if re.fullmatch(r"checkpoint-\d+", named.name):
        folders.verify(named)
        return named.parent, named
    if not (named / MARK).exists():
        raise CheckpointError(f"{named} is not a run folder: it has no {MARK}")
    return named, None


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run and what was passed over for it.

    Raises:
        CheckpointError: there are checkpoints, and none is complete.
    """
    found, skipped = checkpoint.newest(run)
    if found is None and skipped:
        raise CheckpointError(f"{run} has no complete checkpoint:\n" + "\n".join(f"  {reason}" for reason in skipped))
    return found, skipped


def read_config(run: Path, words: list[str] | None = None) -> RunConfig:
    """The resolved configuration of a run, with overrides.

    Raises:
        CheckpointError: this is not a run folder.
    """
    if not (run / MARK).is_file():
        raise CheckpointError(f"{run} is not a run folder: it has no {MARK}")
    return load(run / MARK, words or [])


def write_start(run: Path, config: RunConfig, prepared: Prepared) -> None:
    """Write what is known when a run starts or goes on."""
    run.mkdir(parents=True, exist_ok=True)
    folders.clear_leftovers(run)
    stored = config.model_copy(update={"output_dir": str(run), "resume": False, "allow_changed": False})
    folders.replace_text(run / MARK, dump(stored))
    folders.replace_text(run / "data.json", json.dumps(data_facts(prepared), indent=1, ensure_ascii=False))
    starts = _read_list(run / "env.json")
    folders.replace_text(run / "env.json", json.dumps([*starts, environment()], indent=1))


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """What was found in the data."""
    return {
        "task": prepared.task,
        "format": prepared.format,
        "columns": prepared.columns,
        "labels": prepared.labels,
        "multi_label": prepared.multi_label,
        "multi_text": prepared.multi_text,
        "max_length": prepared.report.max_length,
        "fingerprint": prepared.fingerprint,
        "train": len(prepared.train),
        "held_out": {name: len(encoded) for name, encoded in prepared.evals.items()},
        "report": prepared.report.lines(),
    }


@cache
def _packages() -> dict[str, str]:
    """What is installed, read once: some hundred files."""
    found = importlib.metadata.distributions()
    return {dist.metadata["Name"]: dist.version for dist in found if dist.metadata["Name"]}


def environment() -> dict[str, Any]:
    """Machine and software, as far as they bear on results."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "inlay": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "arguments": sys.argv[1:],
        "packages": dict(sorted(_packages().items(), key=lambda item: item[0].lower())),
    }


def forget_after(run: Path, step: int) -> None:
    """Drop the samples of evaluations after a step: they will be made again."""
    path = run / "samples.jsonl"
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")[0]  # a kill may have cut the last line
        lines = [f"{line}\n" for line in whole.decode("utf-8").split("\n") if line]
        folders.replace_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def bytes_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_list(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return value if isinstance(value, list) else []


def _first(data: str | list[str]) -> str:
    return data if isinstance(data, str) else data[0]


def _slug(name: str) -> str:
    stem = Path(name.partition("#")[0]).name or name
    stem = re.sub(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|conll)(\.gz)?$", "", stem)
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", stem).strip("-.").lower() or "run"
