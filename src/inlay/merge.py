"""Folding the linear part of an adapter into the weights, W ← W + ΔW, and taking it out again, bit for bit.

While an adapter is merged it is part of the base: it acts on every row, before all others, and costs nothing. The
tensors it replaced are kept as the objects that they are; `unmerge` puts them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from inlay.anatomy.probe import modules_of
from inlay.errors import AdapterError, MergeError, nearest
from inlay.fold import Damage, Saved, changed, fold, install, restore
from inlay.hosts.base import Host, Hosted, Placed
from inlay.methods.base import Delta, ExtraKV, HeadDelta, Replacement, VirtualTokens
from inlay.quant.bridge import is_quantized
from inlay.state import State, state_of
from inlay.ties import Ties

if TYPE_CHECKING:
    from inlay.adapter import Adapter

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
}  # fmt: skip

_WHY = {
    ExtraKV: "adds keys and values, which no weight holds",
    HeadDelta: "acts inside the attention",
    VirtualTokens: "adds tokens",
}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: the rounding of every stored weight, and the sites that stayed as they were, with why."""

    name: str
    merged: tuple[str, ...]
    damages: tuple[Damage, ...] = ()
    rest: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """‖Q(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ over all modules together."""
        error = sum(d.error**2 for d in self.damages) ** 0.5
        delta = sum(d.delta**2 for d in self.damages) ** 0.5
        return error / delta if delta else float("inf") if error else 0.0

    def __str__(self) -> str:
        lines = [f"adapter {self.name!r} is merged into {len(self.merged)} modules"]
        if self.damages:
            lines.append(f"  rounding  ‖Q(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ = {self.ratio:.2%} in total; the worst:")
            for d in sorted(self.damages, key=lambda d: -d.ratio)[:5]:
                tune = f"‖ΔW‖ is {d.delta / d.weight:.2%} of ‖W‖" if d.weight else "W is zero"
                lines.append(f"    {d.path}  {d.ratio:.2%}  ({tune})")
        lines += [f"  still attached: {path}: {why}" for path, why in self.rest.items()]
        return "\n".join(lines)


@dataclass(eq=False)
class Record:
    """What `unmerge` needs. `known` are the adapters that were attached when this one was merged."""

    ties: Ties
    known: frozenset[str]
    to: torch.dtype | None
    requantise: bool
    report: MergeReport
    saved: dict[str, Saved] = field(default_factory=dict)
    stale: list[Placed] = field(default_factory=list)


def merge(
    adapter: Adapter,
    *,
    parts: Literal["all", "linear"] = "all",
    to: str | torch.dtype | None = None,
    requantise: bool = False,
    permanent: bool = False,
) -> MergeReport:
    """Folds an adapter into the weights of its model: W ← W + ΔW, b ← b + Δb; trained heads and norms are swapped in.

    The sum is computed in fp32 and rounded once to the dtype of W; the report says what that rounding costs. Tied
    weights are untied: the merged module gets a tensor of its own.

    Args:
        adapter: an attached adapter.
        parts: "linear" leaves pieces that cannot be folded attached and active, and names them in the report; "all"
            refuses them.
        to: for quantised modules, the dtype ("bf16", "fp16", "fp32") of a dense copy that takes their place.
        requantise: for quantised modules, round W + ΔW to their own 4-bit form again, and print the measured damage.
        permanent: detach the adapter afterwards and keep nothing to undo it with: what is left is a plain model.

    Raises:
        MergeError: a piece is not linear, or a module is quantised and neither `to` nor `requantise` is given; the
            message lists the sites. The model is unchanged.
        AdapterError: the adapter is not attached.
    """
    state, modules = _attached(adapter), dict(modules_of(adapter.model))
    if adapter.merged:
        raise MergeError(f"adapter {adapter.name!r} is merged already. unmerge() takes it out.")
    if parts not in ("all", "linear"):
        raise MergeError(f"parts={parts!r} is not known: {nearest(str(parts), ('all', 'linear'))}")
    if permanent and state.merged:
        raise MergeError(
            f"{state.merged} are merged and may be taken out again; unmerge them, or merge them permanently."
        )
    dtype = dtype_of(to)
    if dtype is not None and requantise:
        raise MergeError("to= keeps a dense copy and requantise=True a quantised one; choose one of them.")
    from inlay.formats.native import base_of

    base_of(adapter)
    chosen, rest = _linear(state, modules, adapter.name)
    if (rest and (parts == "all" or permanent)) or not chosen:
        raise MergeError(_refusal(adapter, rest))
    _refuse_order(state, adapter.name, chosen)
    quantised = [path for path in chosen if is_quantized(modules[path])]
    if (dtype is not None or requantise) and not quantised:
        raise MergeError(
            f"to= and requantise= are for quantised modules, and none of those that {adapter.name!r} adapts is; "
            "merge() alone keeps the dtype of each weight."
        )
    report = _fold_in(state, adapter, modules, chosen, rest, dtype, requantise)
    if requantise:
        print(report)
    if permanent:
        _forget(state, adapter, modules)
    return report


def unmerge(adapter: Adapter) -> None:
    """Takes a merged adapter out of the weights; every bit of them is as before.

    Adapters that were merged after it are taken out first and merged again afterwards.

    Raises:
        MergeError: it is not merged, the weights were changed since, another adapter was built from the merged
            weights, or one merged later cannot stay so without this one. Nothing has changed then.
    """
    state = _attached(adapter)
    if not adapter.merged:
        raise MergeError(f"adapter {adapter.name!r} is not merged.")
    later = [state.adapters[n] for n in state.merged[state.merged.index(adapter.name) + 1 :]]
    modules = dict(modules_of(adapter.model))
    for each in [adapter, *later]:
        _refuse_changed(state, each, modules)
    records = [(each, each._merge_record) for each in [adapter, *later]]
    for each, record in reversed(records):
        _undo(state, each, modules, record)
    try:
        for each, record in records[1:]:
            _again(state, modules, each, record)
        state.activate(state.groups, state.batch)
    except (AdapterError, MergeError) as error:
        for each in [each for each in reversed(later) if each.merged]:
            _undo(state, each, modules, each._merge_record)
        for each, record in records:
            _again(state, modules, each, record)
        names = [each.name for each in later]
        raise MergeError(
            f"{names} cannot stay merged once {adapter.name!r} acts beside the weights again. Unmerge {names} first."
        ) from error


def _again(state: State, modules: dict[str, nn.Module], adapter: Adapter, record: Record) -> None:
    """Merges as before."""
    chosen, rest = _linear(state, modules, adapter.name)
    _fold_in(state, adapter, modules, chosen, rest, record.to, record.requantise)


def original(model: nn.Module, path: str, name: str) -> nn.Parameter | None:
    """A parameter of the base as it was before anything was merged into it."""
    state = state_of(model)
    for merged in state.merged if state is not None else ():
        saved = state.adapters[merged]._merge_record.saved.get(path)  # type: ignore[union-attr]
        if saved is not None:
            parameter: nn.Parameter | None = saved.parameters.get(name)
            return parameter
    return model.get_submodule(path)._parameters.get(name)


def _attached(adapter: Adapter) -> State:
    state = state_of(adapter.model)
    if state is None or state.adapters.get(adapter.name) is not adapter:
        raise AdapterError(f"adapter {adapter.name!r} is not attached to its model any more.")
    return state


def dtype_of(to: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that `to` names.

    Raises:
        MergeError: it names none.
    """
    if to is None or isinstance(to, torch.dtype):
        if to is not None and to not in DTYPES.values():
            raise MergeError(f"to={to} is no dtype for a dense weight; {', '.join(DTYPES)} are.")
        return to
    if to not in DTYPES:
        raise MergeError(f"to={to!r} is not known: {nearest(to, DTYPES)}")
    return DTYPES[to]


def _placed(state: State, name: str) -> Iterator[tuple[str, Hosted, list[Placed]]]:
    for path, module in state.hosts.items():
        if isinstance(module, Host) and name in module._inlay.placed:
            yield path, module._inlay, module._inlay.placed[name]


def _linear(state: State, modules: dict[str, nn.Module], name: str) -> tuple[dict[str, list[Placed]], dict[str, str]]:
    """The pieces of an adapter that can be folded, by module, and why the others cannot."""
    chosen: dict[str, list[Placed]] = {}
    rest: dict[str, str] = {}
    for path, _, placed in _placed(state, name):
        replaced = [p for p in placed if isinstance(p.piece, Replacement)]
        ordered = replaced + [p for p in placed if p not in replaced]
        reasons = [_reason(p, modules[path]) for p in ordered]
        blocked = "" if not any(p.site.tap == "through" for p in ordered) else "the module runs twice"
        taken: list[Placed] = []
        for piece, why in zip(ordered, reasons, strict=True):
            if not why and piece.site.tap == "input" and any(reasons):
                why = "it changes what a piece that cannot be folded reads at the same module"
            if why or blocked:
                rest[f"{path} ({type(piece.piece).__name__})"] = why or blocked
                blocked = blocked or "it acts after a piece that cannot be folded at the same module"
            else:
                taken.append(piece)
        if taken:
            chosen[path] = taken
    return chosen, rest


def _reason(placed: Placed, module: nn.Module) -> str:
    """Why a piece cannot be folded, or "" if it can."""
    piece, site = placed.piece, placed.site
    for contract, why in _WHY.items():
        if isinstance(piece, contract):
            return why
    if placed.stale:
        return "it is relative to the frozen weights, and another adapter was merged into them since it was attached"
    if isinstance(piece, Replacement):
        own = getattr(piece, "module", None)
        return "" if isinstance(own, nn.Module) else "it replaces a module by something else than a copy of it"
    assert isinstance(piece, Delta)
    if site.tap == "through":
        return "the module runs twice"
    if site.enter != site.leave:
        return f"it spans from {site.enter} to {site.leave}, with more between than one weight"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "the embedding renormalises its rows (max_norm)"
    if type(piece).fold is Delta.fold:
        try:
            with torch.no_grad():
                piece.weight_delta()
        except MergeError as error:
            return str(error)
    return ""


def _refusal(adapter: Adapter, rest: dict[str, str]) -> str:
    why: dict[str, list[str]] = {}
    for path, reason in rest.items():
        why.setdefault(reason, []).append(path)
    lines = [f"{reason}: {', '.join(paths)}" for reason, paths in why.items()]
    return (
        f"adapter {adapter.name!r} cannot be merged exactly:\n  " + "\n  ".join(lines) + "\nKeep it attached"
        + (', or merge the linear part alone with merge(parts="linear").' if len(rest) < len(adapter.pieces) else ".")
    )  # fmt: skip


def _refuse_order(state: State, name: str, chosen: dict[str, list[Placed]]) -> None:
    """A merged adapter acts first; one that now acts after another on the same module would change its result."""
    before = {n for g in state.groups if name in g.names for n in g.names[: g.names.index(name)]} - set(state.merged)
    for path in chosen:
        host: Any = state.hosts[path]
        both = sorted(n for n in before if n in host._inlay.placed)
        if both:
            raise MergeError(
                f"{both} act before {name!r} on {path}, and a merged adapter acts first. Name {name!r} first in use(), "
                f"or merge {both} before it."
            )


def _fold_in(
    state: State,
    adapter: Adapter,
    modules: dict[str, nn.Module],
    chosen: dict[str, list[Placed]],
    rest: dict[str, str],
    to: torch.dtype | None,
    requantise: bool,
) -> MergeReport:
    with torch.inference_mode(False):
        memo: dict[int, Any] = {}
        folds = [fold(path, modules[path], pieces, to, requantise, memo) for path, pieces in chosen.items()]
    damages = tuple(f.damage for f in folds if f.damage is not None)
    report = MergeReport(adapter.name, tuple(chosen), damages, rest)
    record = Record(Ties(adapter.model), frozenset(state.adapters), to, requantise, report)
    try:
        for each in folds:
            record.saved[each.path] = install(modules[each.path], each)
            for placed in each.pieces:
                placed.merged = True
            record.stale += _relative(modules[each.path], adapter.name)
        for placed in record.stale:
            placed.stale = True
        record.ties.broken(adapter.model, {f.path: f.attributes for f in folds})
        adapter.merged, adapter._merge_record = True, record
        state.merged.append(adapter.name)
        state.activate(state.groups, state.batch)
    except BaseException:
        _undo(state, adapter, modules, record)
        state.activate(state.groups, state.batch)
        raise
    return report


def _relative(module: Any, name: str) -> list[Placed]:
    """The pieces of other adapters at a module that are relative to its frozen weights."""
    others = (p for other, placed in module._inlay.placed.items() if other != name for p in placed)
    return [p for p in others if p.piece.needs_frozen and not p.stale and not p.merged]


def _undo(state: State, adapter: Adapter, modules: dict[str, nn.Module], record: Record) -> None:
    for path, each in record.saved.items():
        restore(modules[path], each)
    for _, _, pieces in _placed(state, adapter.name):
        for placed in pieces:
            placed.merged = False
    for placed in record.stale:
        placed.stale = False
    record.ties.restore(adapter.model)
    adapter.merged, adapter._merge_record = False, None
    if adapter.name in state.merged:
        state.merged.remove(adapter.name)


def _refuse_changed(state: State, adapter: Adapter, modules: dict[str, nn.Module]) -> None:
    record: Record = adapter._merge_record
    touched = [path for path, saved in record.saved.items() if changed(modules[path], saved)]
    # An adapter merged later has put its own tensors there, and is taken out first.
    later = state.merged[state.merged.index(adapter.name) + 1 :]
    touched = [p for p in touched if not any(p in state.adapters[n]._merge_record.saved for n in later)]
    if touched:
        raise MergeError(
            f"the weights of {touched[:5]} were changed after {adapter.name!r} was merged, so unmerging would lose "
            "that change. Put them back first, or load the model anew."
        )
    for name in state.adapters.keys() - record.known:
        built = [
            path
            for path, _, placed in _placed(state, name)
            if path in record.saved and any(isinstance(p.piece, Replacement) or p.piece.needs_frozen for p in placed)
        ]
        if built:
            raise MergeError(
                f"adapter {name!r} was attached while {adapter.name!r} was merged, and was built from the merged "
                f"weights of {built[:5]}. Detach {name!r} first."
            )


def _forget(state: State, adapter: Adapter, modules: dict[str, nn.Module]) -> None:
    """Makes the merged tensors the model's own and detaches the adapter."""
    record: Record = adapter._merge_record
    for path, saved in record.saved.items():
        for name in saved.installed:
            old, new = saved.parameters.get(name), modules[path]._parameters[name]
            assert new is not None
            state.frozen = [(new if p is old else p, grad) for p, grad in state.frozen]
    state.merged.remove(adapter.name)
    state.fingerprint = None
    adapter.merged, adapter._merge_record = False, None
    adapter.detach()
