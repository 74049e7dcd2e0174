"""The attention function of modules that host pieces: the model's own function, given more keys and values.

Extra keys stand before the others. Every query sees them: through causal masks, padding, sliding windows and chunks,
for they are parameters and have no position. They are not rotated, do not enter the KV cache and shift no position.

A piece may gate its keys and values by a number g for each query (`ExtraKV`). Then q' = [q; g q], k' = [k; 0],
v' = [v; 0] for the model's keys and k' = [0; k], v' = [0; v] for the piece's give the scores q·k and g q·k, and the two
halves of the output add up to what is meant as o_1 + g o_2; the function itself need not know.

Legend: B batch, T queries, K keys, H heads, P extra keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.anatomy.probe import PROBE
from inlay.errors import AttachmentError, SiteError
from inlay.methods.base import ExtraKV, HeadDelta
from inlay.padding import Padding
from inlay.route import Group, Rows, join

NAME = "inlay"
SERVED = ("sdpa", "eager")
KNOWN = ("position_bias", "sinks")
"""Arguments with four dimensions that leave room for extra keys: a bias is extended, sinks stand beside all keys."""

KEYED = ("indices", "block_indices", "attention_bias")
"""Arguments of some attention functions that speak of single keys in a way that `attend` does not know."""

Result = tuple[Tensor, Tensor | None]
Function = Callable[..., Result]


@dataclass(eq=False)
class Acts:
    """Everything one group of rows needs at one attention."""

    rows: Rows
    kv: tuple[ExtraKV, ...]
    heads: tuple[HeadDelta, ...]


@dataclass(eq=False)
class Plan:
    """What a hosted attention does under the present route; `x` and `calls` only live during one forward pass."""

    groups: tuple[Acts, ...]
    joins: tuple[Group, ...]
    padding: Padding | None = None
    x: Tensor | None = None
    calls: int = 0


@dataclass(eq=False)
class Recording:
    """Takes the place of a plan for one forward pass that only looks at the keys and values."""

    key: Tensor | None = None
    value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one call of an attention function is given, for some rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]


def former(module: Any) -> tuple[str, Function]:
    """The name and the attention function that a hosted module would call without inlay.

    Raises:
        AttachmentError: it cannot take extra keys.
    """
    name = module._inlay.config._attn_implementation or "eager"
    if name == PROBE:
        return name, module.functions[PROBE]
    if name not in SERVED or (name == "eager" and module.eager is None):
        raise AttachmentError(
            f"{module._inlay.path} uses the attention function {name!r}, whose mask extra keys cannot extend. Call "
            'model.set_attn_implementation("sdpa"), or use methods without prefixes on this model.'
        )
    return name, module.functions.get_interface(name, module.eager)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Result:
    """The former attention function, with the pieces of each group of rows.

    Args:
        module: the hosted module that calls.
        query, key, value: [B, H, T, D], [B, H_kv, K, D], [B, H_kv, K, D_v].
        attention_mask: as built for the former function: None, or 4 dimensions ending in K.
        kwargs: whatever the model passes to its attention function.

    Returns:
        The heads' output [B, T, H, D_v] and, from a function that gives them, the attention weights [B, H, T, P + K].
    """
    name, function = former(module)
    plan = module._inlay.plan
    if isinstance(plan, Recording):
        plan.key, plan.value = key, value
    if not isinstance(plan, Plan):
        return function(module, query, key, value, attention_mask, **kwargs)
    plan.calls += 1
    if plan.calls > 1:
        raise AttachmentError(
            f"{module._inlay.path} calls its attention function more than once in a forward pass, so it is not known "
            "which call extra keys belong to. Use methods without prefixes there (LoRA, Bottleneck, ...)."
        )
    if name == PROBE:
        return function(module, query, key, value, attention_mask, **kwargs)
    if plan.x is None:
        raise AttachmentError(
            f"{module._inlay.path}: its forward was replaced on the module itself, so inlay did not see the "
            "input. Undo that (offloading hooks, for example), attach, and apply it again."
        )
    return serve(module, name, function, plan, plan.x, Inputs(query, key, value, attention_mask, kwargs))


def serve(module: Any, name: str, function: Function, plan: Plan, x: Tensor, inputs: Inputs) -> Result:
    """An attention function with the pieces of each group of rows.

    Args:
        module: the hosted module that calls.
        name: "sdpa" where the function derives a causal mask from shapes.
        function: takes (module, query, key, value, mask, **kwargs).
        plan: the pieces.
        x: the module's input [B, T, I].
        inputs: what it calls the function with.
    """
    if len(plan.groups) == 1:
        return _one(module, name, function, plan.groups[0], x, inputs)
    parts = []
    for acts in plan.groups:
        if plan.padding is not None:
            plan.padding.rows = acts.rows
        parts.append(_one(module, name, function, acts, acts.rows.take(x), _rows(acts.rows, inputs)))
    if plan.padding is not None:
        plan.padding.rows = None
    return join(plan.joins, [out for out, _ in parts]), _join_weights(plan.joins, [weights for _, weights in parts])


def _rows(rows: Rows, inputs: Inputs) -> Inputs:
    total = inputs.query.shape[0]

    def part(given: Any) -> Any:
        whole = isinstance(given, Tensor) and given.ndim > 1 and given.shape[0] == total
        return rows.take(given) if whole else given

    kwargs = {name: part(value) for name, value in inputs.kwargs.items()}
    return Inputs(part(inputs.query), part(inputs.key), part(inputs.value), part(inputs.mask), kwargs)


def _join_weights(joins: Sequence[Group], weights: list[Tensor | None]) -> Tensor | None:
    """Attention weights of all rows; rows with fewer extra keys have zeros in front."""
    found = [w for w in weights if w is not None]
    if len(found) < len(weights):
        return None
    width = max(w.shape[-1] for w in found)
    return join(joins, [F.pad(w, (width - w.shape[-1], 0)) for w in found])


def _one(module: Any, name: str, function: Function, acts: Acts, x: Tensor, given: Inputs) -> Result:
    """The former function for the rows of one group."""
    inputs = given
    gates: list[Tensor] = []
    if acts.kv:
        _refuse_unknown(module, given)
        if name == "sdpa" and given.mask is None and given.query.shape[2] > 1 and _causal(module, given):
            inputs = _masked(given)
        inputs, gates = _extended(inputs, [piece(x) for piece in acts.kv], module._inlay.path)
    out, weights = function(module, inputs.query, inputs.key, inputs.value, inputs.mask, **inputs.kwargs)
    if gates:
        first, *others = out.chunk(1 + len(gates), dim=-1)
        out = first
        for gate, other in zip(gates, others, strict=True):
            out = out + gate.transpose(1, 2) * other
    if acts.heads:
        scaling = given.kwargs.get("scaling")
        scaled = given.query * (given.query.shape[-1] ** -0.5 if scaling is None else scaling)
        for head in acts.heads:
            out = out + head(scaled).transpose(1, 2).to(out.dtype)
    return out, weights


def _causal(module: Any, given: Inputs) -> bool:
    causal = given.kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _masked(given: Inputs) -> Inputs:
    """The same with the causal mask that SDPA would derive from the shapes, made explicit.

    SDPA takes query i to stand at key i and looks at the first T keys only (a static cache has more). After the extra
    keys are in front, both would be wrong without a word, so its cut is made first.
    """
    size = given.query.shape[2]
    key, value = given.key[:, :, :size], given.value[:, :, :size]
    mask = torch.ones(size, key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    bias = given.kwargs.get("position_bias")
    kwargs = given.kwargs if bias is None else given.kwargs | {"position_bias": bias[..., :size]}
    return Inputs(given.query, key, value, mask, kwargs)


def _extended(given: Inputs, extra: list[tuple[Tensor, ...]], path: str) -> tuple[Inputs, list[Tensor]]:
    """The extra keys and values in front, in order, and the gates [B, 1, T, 1] of those that have one."""
    count = sum(k.shape[2] for k, *_ in extra)
    mask, kwargs = given.mask, given.kwargs
    if mask is not None:
        mask = F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)
    if kwargs.get("position_bias") is not None:
        kwargs = kwargs | {"position_bias": F.pad(kwargs["position_bias"], (count, 0))}
    keys = [_like(k, given.key, path) for k, *_ in extra]
    values = [_like(v, given.value, path) for _, v, *_ in extra]
    gates = [entry[2].to(given.query.dtype)[:, None] for entry in extra if len(entry) > 2]
    query, key, value = given.query, given.key, given.value
    if gates:
        parts, last = 1 + len(gates), 0
        for i, entry in enumerate(extra):
            last += len(entry) > 2
            place = last if len(entry) > 2 else 0
            keys[i], values[i] = _at(keys[i], place, parts), _at(values[i], place, parts)
        key, value = _at(key, 0, parts), _at(value, 0, parts)
        kwargs = kwargs | {"scaling": query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]}
        query = torch.cat([query, *(gate * query for gate in gates)], dim=-1)
    return Inputs(query, torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2), mask, kwargs), gates


def _at(tensor: Tensor, place: int, parts: int) -> Tensor:
    """The features of a tensor as one of several equal parts, zeros elsewhere."""
    size = tensor.shape[-1]
    return F.pad(tensor, (place * size, (parts - 1 - place) * size))


def _like(extra: Tensor, given: Tensor, path: str) -> Tensor:
    """An extra key or value for each row, in the dtype of the others."""
    if extra.shape[1] != given.shape[1] or extra.shape[3] != given.shape[3]:
        raise SiteError(
            f"{path} has {given.shape[1]} key/value heads of size {given.shape[3]}, but a piece gave "
            f"{extra.shape[1]} of size {extra.shape[3]}."
        )
    return extra.to(given.dtype).expand(given.shape[0], -1, -1, -1)


def _refuse_unknown(module: Any, given: Inputs) -> None:
    path = module._inlay.path
    if given.mask is not None and not (isinstance(given.mask, Tensor) and given.mask.ndim == 4):
        raise AttachmentError(
            f"{path} got an attention mask of another form than [batch, heads, queries, keys], so extra keys cannot be "
            'added to it. Call model.set_attn_implementation("sdpa").'
        )
    if given.kwargs.get("cache") is not None:
        raise AttachmentError(f"{path} runs with a paged cache (continuous batching), which takes no extra keys.")
    for name, value in given.kwargs.items():
        if isinstance(value, Tensor) and (value.ndim == 4 or name in KEYED) and name not in KNOWN:
            raise AttachmentError(
                f"{path} passes {name!r} to its attention function, which speaks of single keys in a way that inlay "
                "does not know, so extra keys would be misread. Use methods without prefixes on this model."
            )


__all__ = ["NAME", "Acts", "Function", "Inputs", "Plan", "Recording", "attend", "former", "serve"]
