"""Checkpoints: everything that decides the next step, in safetensors and JSON, never pickled.

checkpoint-120/
  adapter/                 the adapter as `Adapter.save` writes it, to use
  adapter.safetensors      the adapter as it is trained, reparametrisations included, to go on
  best/                    the best adapter so far, when one was measured
  optimizer.safetensors    moments, by parameter
  random.safetensors       states of the random generators
  state.json               step, position in the data, schedule, running sums, identity of the run
  metrics.jsonl            the log up to this step
  manifest.json            sizes and hashes; written last
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inlay import folders
from inlay.errors import CheckpointError, InlayError

FORMAT = 1


@dataclass
class RunState:
    """Where a run stands. Saved in every checkpoint; equal values mean equal futures."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch already used
    rows: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # since the last line of the log
    target_sum: int = 0
    evaluated: int = -1  # step of the last evaluation
    best_step: int | None = None
    best_metric: float | None = None
    not_better: int = 0
    untouched: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
    seconds: float = 0.0
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RunState:
        """From JSON; a field too many or too few is an error."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise CheckpointError(f"state.json has the fields {sorted(values)}, expected {sorted(known)}")
        return cls(**values)


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run folder."""
    return run / f"checkpoint-{step}"


def candidates(run: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    found: dict[int, Path] = {}
    for path in run.iterdir() if run.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d{1,12})(\.replaced)?", path.name)
        if match and path.is_dir():
            step = int(match[1])
            found[step] = folders.recover(path_of(run, step))
    return [found[step] for step in sorted(found, reverse=True)]


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and why each newer one was passed over."""
    skipped = []
    for path in candidates(run):
        try:
            folders.verify(path)
            read_state(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    return None, skipped


def whole(run: Path, step: int) -> Path | None:
    """The checkpoint of a step, where it is there and complete."""
    path = folders.recover(path_of(run, step))
    try:
        folders.verify(path)
        read_state(path)
    except CheckpointError:
        return None
    return path


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in candidates(run)[keep:]:
        folders.remove(path.with_name(path.name + folders.REPLACED))
        folders.remove(path)


def write(
    run: Path,
    state: RunState,
    *,
    adapter: Any,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `state.step`, then remove the oldest ones. A failure leaves the earlier ones whole."""

    def fill(folder: Path) -> None:
        adapter.save(folder / "adapter")
        save_tensors(adapter.state_dict(), folder / "adapter.safetensors")
        if (run / "best").is_dir():
            shutil.copytree(run / "best", folder / "best")
        moments, plain = pack_optimizer(optimizer)
        save_tensors(moments, folder / "optimizer.safetensors")
        generators, python = random_state()
        save_tensors(generators, folder / "random.safetensors")
        document = {
            "format": FORMAT,
            "run": asdict(state),
            "optimizer": plain,
            "random": python,
            "identity": dict(identity),
            **extra,
        }
        (folder / "state.json").write_text(json.dumps(document), encoding="utf-8")
        log = run / "metrics.jsonl"
        (folder / "metrics.jsonl").write_bytes(log.read_bytes() if log.exists() else b"")

    target = path_of(run, state.step)
    folders.write_folder(target, fill)
    prune(run, keep)
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checked `state.json` of a checkpoint."""
    state = folders.read_json(checkpoint / "state.json")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint}: state.json has format {state.get('format')!r}, this version reads {FORMAT}"
        )
    wrong = [k for k in ("run", "optimizer", "random", "identity") if not isinstance(state.get(k), dict)]
    if wrong:
        raise CheckpointError(f"{checkpoint}: state.json lacks {', '.join(wrong)}")
    RunState.read(state["run"])
    return state


def restore(folder: Path, *, adapter: Any, optimizer: torch.optim.Optimizer) -> tuple[RunState, dict[str, Any]]:
    """Put a checkpoint's adapter, optimizer and random generators back; returns where the run stands and all state.

    Raises:
        CheckpointError: the checkpoint cannot be read, or was made by another adapter.
    """
    document = read_state(folder)
    with folders.understood(folder, CheckpointError):
        adapter.load_state_dict(read_tensors(folder / "adapter.safetensors"))
        unpack_optimizer(optimizer, read_tensors(folder / "optimizer.safetensors"), document["optimizer"])
        set_random_state(read_tensors(folder / "random.safetensors"), document["random"])
        return RunState.read(document["run"]), document


def restore_run_files(folder: Path, run: Path) -> None:
    """Set the log and the best adapter of a run back to what they were at a checkpoint."""
    folders.replace_text(run / "metrics.jsonl", (folder / "metrics.jsonl").read_text(encoding="utf-8"))
    if (folder / "best").is_dir():
        folders.write_folder(run / "best", partial(_copy, folder / "best"), manifest=False)
    else:
        folders.remove(run / "best")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors from any device; tied ones are written each.

    Raises:
        OSError: the disk does not take them; safetensors has an error of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or a CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and JSON.

    A tensor is named "parameter.entry", or "parameter.entry.part" for an entry that is itself a dictionary of tensors,
    as the 8-bit optimizers of bitsandbytes keep them.

    Raises:
        CheckpointError: a state that is neither tensors nor plain values.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            elif isinstance(value, dict) and all(isinstance(part, torch.Tensor) for part in value.values()):
                tensors |= {f"{index}.{key}.{name}": part for name, part in value.items()}
            else:
                plain.setdefault(str(index), {})[key] = value
    document = {"plain": plain, "groups": state["param_groups"]}
    try:
        json.dumps(document)
    except TypeError as error:
        raise CheckpointError(f"{type(optimizer).__name__} keeps a state that JSON cannot hold: {error}") from None
    return tensors, document


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any]
) -> None:
    """The reverse of `pack_optimizer`, into an optimizer over the same parameters."""
    now = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in now] != [g["params"] for g in document["groups"]]:
        sizes = [[len(g["params"]) for g in groups] for groups in (document["groups"], now)]
        raise CheckpointError(f"the optimizer has other parameter groups: {sizes[0]} in the checkpoint, {sizes[1]} now")
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in document["plain"].items()}
    for name, tensor in tensors.items():
        index, key, *part = name.split(".")
        entries = state.setdefault(int(index), {})
        if part:
            entries.setdefault(key, {})[part[0]] = tensor
        else:
            entries[key] = tensor
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in document["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of torch's generators (CPU and each CUDA device) and of Python's and NumPy's."""
    import numpy

    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return tensors, {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
    }


def set_random_state(tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any]) -> None:
    """The reverse of `random_state`. Generators of devices that are absent now are left."""
    import numpy

    try:
        version, internal, gauss_next = document["python"]
        random.setstate((version, tuple(internal), gauss_next))
        kind, keys, position, has_gauss, gauss = document["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
        torch.set_rng_state(tensors["cpu"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random state of the checkpoint cannot be read: {error}") from None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, in the checkpoint, now) for each part of the identity that changed."""
    keys = dict.fromkeys([*then, *now])
    return [(key, then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)]


def refuse_changes(changes: list[tuple[str, Any, Any]], checkpoint: Path) -> None:
    """Raise a CheckpointError that shows each change."""
    shown = "\n".join(f"  {key}: {was!r} in the checkpoint, {now!r} now" for key, was, now in changes)
    raise CheckpointError(
        f"{checkpoint} belongs to a run that differs from this one:\n{shown}\n"
        "Set these back, start a new run folder, or pass --allow-changed to go on and have the change recorded."
    )


class Interrupted(InlayError):
    """A run that a signal ended, after its checkpoint was written. `exit_code` is 130 or 143."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
