"""Writes a model with its adapters merged as a plain transformers checkpoint, and reads it back before saying so."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.anatomy.probe import modules_of
from inlay.errors import AdapterError, InlayError, MergeError
from inlay.fold import DenseLinear
from inlay.folders import ASIDE, remove, write_folder
from inlay.hosts.base import Host
from inlay.merge import MergeReport, dtype_of, merge, unmerge
from inlay.quant.bridge import is_quantized, weight_of
from inlay.route import everyone
from inlay.state import State, known_name, require

_ABSENT = object()


@torch.no_grad()
def export_merged(
    model: nn.Module, path: str | Path, names: str | Sequence[str] | None = None, *, to: str | torch.dtype | None = None
) -> list[MergeReport]:
    """Writes a checkpoint that plain transformers loads and that computes what the model with its adapters computes.

    The folder appears only after the checkpoint was loaded again, every tensor of it was equal, and the logits of a few
    tokens were. The model is left as it was.

    Args:
        model: a transformers model with adapters.
        path: the folder to write; it must not exist or be empty.
        names: the adapters to merge, in this order; by default those that are active on every row.
        to: the dtype ("bf16", "fp16", "fp32") of all floating-point tensors written. A quantised model needs it: what
            is written is dense.

    Returns:
        What each merge did to the weights.

    Raises:
        MergeError: an adapter is not linear, the model is quantised and `to` is not given, or the checkpoint does not
            give the same results when it is loaded again.
        AdapterError: unknown names, or no single choice of adapters is active.
    """
    target, state, dtype = Path(path), require(model), dtype_of(to)
    cls: Any = type(model).base if isinstance(model, Host) else type(model)
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "save_pretrained"):
        raise MergeError(f"a {cls.__name__} is no transformers model; merge it and save its state dict yourself.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MergeError(f"{target} is there already and not empty; choose another folder.")
    chosen = [names] if isinstance(names, str) else list(_active(model) if names is None else names)
    for name in chosen:
        known_name(state, name)
    _refuse_half(state, chosen)
    quantised = [p for p, m in modules_of(model) if is_quantized(m)]
    if quantised and dtype is None:
        raise MergeError(
            f"{len(quantised)} modules are stored quantised ({quantised[0]}, ...), and a plain checkpoint is dense: "
            'give its dtype, for example to="bf16", or --dtype bf16 on the command line.'
        )
    merged, before = [], (state.groups, state.batch)
    try:
        state.activate(everyone(tuple(chosen)))
        for name in chosen:
            adapter = state.adapters[name]
            if not adapter.merged:
                merge(adapter, to=dtype if _touches_quantised(adapter) else None)
                merged.append(adapter)
        reports = [state.adapters[name]._merge_record.report for name in chosen]
        _write(model, cls, target, dtype)
    finally:
        for adapter in reversed(merged):
            unmerge(adapter)
        state.activate(*before)
    return reports


def _refuse_half(state: State, chosen: list[str]) -> None:
    others = [name for name in state.merged if name not in chosen]
    if others:
        raise MergeError(f"{others} are merged into the weights too and would be exported with {chosen}: unmerge them.")
    for name in chosen:
        adapter = state.adapters[name]
        if adapter.merged and adapter._merge_record.report.rest:
            raise MergeError(f"only the linear part of adapter {name!r} is merged; what is left cannot be exported.")


def _active(model: nn.Module) -> tuple[str, ...]:
    groups = require(model).groups
    if len(groups) != 1 or not groups[0].names:
        raise AdapterError(
            "the rows of the batch have different adapters now, or none; say which to export: names=('a', 'b')."
        )
    return groups[0].names


def _touches_quantised(adapter: Any) -> bool:
    return any(is_quantized(adapter.model.get_submodule(path)) for path in set(adapter.paths))


def _write(model: nn.Module, cls: Any, target: Path, dtype: torch.dtype | None) -> None:
    tensors = _dense(model, dtype)

    def fill(folder: Path) -> None:
        with _plain(model, dtype):
            model.save_pretrained(folder, state_dict=dict(tensors))  # type: ignore[operator]
        _verify(model, cls, folder, tensors)

    try:
        write_folder(target, fill, manifest=False)
    except InlayError:
        remove(target.with_name(f"{ASIDE}{target.name}"))
        raise


def _dense(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict without pieces and without the tensors beside packed weights. Tied tensors stay tied."""
    packed = {p: m for p, m in modules_of(model) if is_quantized(m)}
    transposed = _transposed(model)
    tensors: dict[str, Tensor] = {}
    cast: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = name.rpartition(".")
        if ".inlay." in f".{name}." or any(name.startswith(f"{p}.weight.") for p in _parents(owner) if p in packed):
            continue
        if owner in packed:
            if last == "weight":
                dense = weight_of(packed[owner], dtype)
                tensors[name] = dense.t().contiguous() if owner in transposed else dense
            elif last == "bias":
                tensors[name] = tensor.detach().to(dtype or tensor.dtype)
            continue
        if id(tensor) not in cast:
            tensor = tensor.t() if owner in transposed and last == "weight" else tensor
            cast[id(tensor)] = tensor.detach().to(dtype or tensor.dtype if tensor.is_floating_point() else tensor.dtype)
        tensors[name] = cast[id(tensor)]
    return tensors


def _transposed(model: nn.Module) -> set[str]:
    """The layers that the plain architecture keeps as (in, out), as GPT-2 does, and this model as (out, in)."""
    linear = {path for path, m in modules_of(model) if isinstance(m, DenseLinear) or is_quantized(m)}
    if not linear:
        return set()
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    cls: Any = type(model).base if isinstance(model, Host) else type(model)
    with torch.device("meta"):
        return {path for path, m in cls(config).named_modules() if type(m).__name__ == "Conv1D"} & linear


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


@contextlib.contextmanager
def _plain(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hides from save_pretrained that the model is, or was, quantised; what it changes in the config is put back."""
    config: Any = model.config
    kept = copy.copy(config.__dict__)
    quantizer = model.__dict__.pop("hf_quantizer", _ABSENT)
    config.__dict__.pop("quantization_config", None)
    try:
        yield
    finally:
        if quantizer is not _ABSENT:
            model.__dict__["hf_quantizer"] = quantizer
        config.__dict__.clear()
        config.__dict__.update(kept)


def _verify(model: nn.Module, cls: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Loads the checkpoint with transformers alone and compares.

    Raises:
        MergeError: a tensor is missing, new or different, or the logits are.
    """
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    again = cls.from_pretrained(folder, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32).eval()
    found = again.state_dict()
    problems = [f"{name} is not loaded again" for name in sorted(tensors.keys() - found.keys())]
    problems += [f"{name} is new" for name in sorted(found.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & found.keys()):
        if not torch.equal(found[name].to(tensors[name].dtype).cpu(), tensors[name].cpu()):
            problems.append(f"{name} has other values")
    own = {n: p for n, p in model.named_parameters() if ".inlay." not in f".{n}."}
    if not problems and all(n in own and own[n].dtype == t.dtype for n, t in tensors.items() if n in own):
        problems += _logits_differ(model, again)
    if problems:
        raise MergeError(
            f"the merged checkpoint does not load back as it was written, so {folder} is not kept: "
            + "; ".join(problems[:5])
        )


def _logits_differ(model: nn.Module, again: nn.Module) -> list[str]:
    from inlay.anatomy.examples import candidates

    training, device = model.training, next(again.parameters()).device
    model.eval()
    try:
        for example in candidates(model):
            try:
                wanted = _first(model(**example))
            except Exception:
                continue
            moved = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in example.items()}
            found = _first(again(**moved)).to(wanted)
            scale = float(wanted.abs().max().clamp_min(1e-6))
            worst = float((found - wanted).abs().max()) / scale
            limit = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
            return [] if worst <= limit else [f"its outputs differ by {worst:.1%}"]
    finally:
        model.train(training)
    return []


def _first(output: Any) -> Tensor:
    values = output.to_tuple() if hasattr(output, "to_tuple") else tuple(output)
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
