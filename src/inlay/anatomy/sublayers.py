"""Cuts a model into blocks and each block into sub-layers: the units that read the residual stream and add to it.

A module is one unit if all it returns was computed by its own leaves, so that the residual stream goes around it.
Leaves outside such modules form a unit with the leaves that they feed directly (BERT's two feed-forward projections).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Axis
from inlay.anatomy.graph import AttentionCall, LeafCall, ModuleCall, Trace
from inlay.anatomy.structure import attention_before
from inlay.anatomy.tree import inside

FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "expert")
"""What modules are called that do the work of a feed-forward layer, whatever else they do (RWKV shifts tokens)."""


def does_feed_forward(path: str) -> bool:
    """Whether a module is called what feed-forward layers are called."""
    word = path.rsplit(".", 1)[-1].lower()
    return any(w in word for w in FEED_FORWARD)


@dataclass(eq=False)
class Unit:
    """One sub-layer: the module that is it, if one is, and the first calls of its leaves.

    It is closed if one of its leaves feeds another: then a leaf behind it is not a part of it.
    """

    path: str | None
    calls: list[LeafCall] = field(default_factory=list)
    closed: bool = False

    @property
    def order(self) -> int:
        """Its place among the sub-layers."""
        return min((c.order for c in self.calls), default=0)


@dataclass(eq=False)
class Layer:
    """One block: its path and its units."""

    path: str
    units: list[Unit] = field(default_factory=list)


class Tree:
    """The called part of a model, by path."""

    def __init__(self, record: Trace, modules: dict[str, nn.Module]) -> None:
        self.record, self.modules = record, modules
        self.calls: dict[str, LeafCall] = {}
        for call in record.leaves:
            self.calls.setdefault(call.path, call)
        self.whole: dict[str, ModuleCall] = {}
        for ran in record.modules:
            self.whole.setdefault(ran.path, ran)
        self.below: dict[str, list[str]] = {}
        for path in modules:
            if path:
                self.below.setdefault(path.rpartition(".")[0], []).append(path)
        self.elements = [p for p in modules if p in self.below and self._is_element(p) and self.leaves(p)]

    def _is_element(self, path: str) -> bool:
        around = self.modules.get(path.rpartition(".")[0])
        return bool(path) and isinstance(around, nn.ModuleList | nn.Sequential)

    def list_around(self, path: str) -> str:
        """The outermost list that a block is in: blocks are counted through it."""
        return next((e.rpartition(".")[0] for e in self.elements if path == e or inside(path, e)), path)

    def leaves(self, path: str) -> list[LeafCall]:
        """The first calls of the leaves within a module."""
        if path in self.calls:
            return [self.calls[path]]
        return [call for child in self.below.get(path, ()) for call in self.leaves(child)]

    def units(self, path: str) -> list[Unit]:
        """The sub-layers within a module, from the top down. Norms belong to none."""
        if path in self.calls:
            call = self.calls[path]
            return [] if call.kind in ("norm", "embedding") else [Unit(None, [call])]
        ran = self.whole.get(path)
        inner = [c for c in self.leaves(path) if c.kind not in ("norm", "embedding")]
        if not inner:
            return []
        if ran is not None and (self.record.comes_from_within(ran, path) or _is_named(ran)):
            closed = any(inside(s.path, path) or s.path == path for c in inner for s in self.record.sources(c.x))
            if not self._is_chain(path):
                return [Unit(path, inner, closed)]
        return [unit for child in self.below.get(path, ()) for unit in self.units(child)]

    def _is_chain(self, path: str) -> bool:
        """Whether two sub-layers follow each other in a module, with no residual sum between them."""
        inner = [child for child in self.below.get(path, ()) if child in self.whole and child not in self.calls]
        inner = [child for child in inner if self.record.comes_from_within(self.whole[child], child)]
        for child in inner:
            sources = [s for c in self.leaves(child) for s in self.record.sources(c.x)]
            if any(inside(s.path, other) for s in sources for other in inner if other != child):
                return any(inside(a.path, path) and a.path != path for a in self.record.attentions)
        return False

    def parts(self, path: str) -> list[Unit]:
        """The sub-layers within a block: itself where it is one and has none inside."""
        inner = _joined(self, [unit for child in self.below.get(path, ()) for unit in self.units(child)])
        whole = self.units(path)
        return whole if len(inner) < 2 and len(whole) == 1 and whole[0].path == path else inner


def _is_named(ran: ModuleCall) -> bool:
    """Whether a module that ran without a graph calls itself a feed-forward layer."""
    return ran.y.grad_fn is None and does_feed_forward(ran.path)


def layers(tree: Tree) -> list[Layer]:
    """The blocks of a model in their order, each with its sub-layers."""
    outer = [e for e in tree.elements if not any(inside(e, other) for other in tree.elements)]
    outer = sorted([*outer, *_apart(tree, outer)], key=list(tree.modules).index) or [""]
    found: dict[str, Layer] = {}
    for element in outer:
        units = tree.parts(element)
        nested = [e for e in tree.elements if inside(e, element)]
        for unit in units:
            path = _block_of(unit, units, element, nested)
            found.setdefault(path, Layer(path)).units.append(unit)
    for layer in found.values():
        layer.units.sort(key=lambda u: u.order)
    return list(found.values())


def _apart(tree: Tree, elements: list[str]) -> list[str]:
    """Modules outside of all lists that hold an attention or compute one, each as high up as it goes."""
    if not elements:
        return []
    known = set(elements)

    def apart(path: str) -> bool:
        return path != "" and not any(path == e or inside(path, e) or inside(e, path) for e in known)

    found: list[str] = []
    places = [a.path for a in tree.record.attentions]
    loose = [c for c in tree.calls.values() if c.kind == "linear" and apart(c.path)]
    places += [c.path for c in loose if attention_before(tree.record, c) is not None]
    for place in dict.fromkeys(places):
        words = place.split(".")
        above = [p for i in range(1, len(words) + 1) if apart(p := ".".join(words[:i]))]
        above = [p for p in above if p in tree.whole and p not in tree.calls]
        if above and above[0] not in found:
            found.append(above[0])
    return found


def _block_of(unit: Unit, units: list[Unit], element: str, nested: list[str]) -> str:
    """The innermost list element around a unit that holds another unit too; else the outermost."""
    around = [e for e in nested if _within(unit, e) and unit.path != e]
    for candidate in sorted(around, key=len, reverse=True):
        if sum(_within(other, candidate) for other in units) > 1:
            return candidate
    return element


def _within(unit: Unit, path: str) -> bool:
    return all(inside(c.path, path) for c in unit.calls)


def _joined(tree: Tree, units: list[Unit]) -> list[Unit]:
    """Units whose leaves feed each other directly are one."""
    owner = {id(c): u for u in units for c in u.calls}
    group = {id(u): u for u in units}

    def root(unit: Unit) -> Unit:
        while group[id(unit)] is not unit:
            unit = group[id(unit)]
        return unit

    results: set[int] = set()
    for call in sorted((c for u in units for c in u.calls), key=lambda c: c.order):
        sources = tree.record.sources(call.x)
        if any(isinstance(s, AttentionCall) for s in sources):
            results.add(id(call))
        # What reads a result reads the residual stream, even where that began inside this block.
        if not sources or any(id(s) not in owner or id(s) in results or owner[id(s)].closed for s in sources):
            continue
        results.add(id(call))
        for source in sources:
            one, other = root(owner[id(source)]), root(owner[id(call)])
            if one is not other:
                group[id(other)] = one
    made: dict[int, Unit] = {}
    for unit in units:
        top = root(unit)
        if top is unit and not any(root(u) is top and u is not unit for u in units):
            made[id(top)] = unit
        else:
            made.setdefault(id(top), Unit(None)).calls += unit.calls
    return list(made.values())


def mixes_tokens(call: ModuleCall, batch: int, features: Axis) -> bool | None:
    """Whether a module's result at one token depends on another token; None where it cannot be tried.

    The module runs twice more, the second time with another first token.
    """
    x = call.x
    axis = 0 if x.ndim < 3 or (x.shape[1] == batch and x.shape[0] != batch) else 1
    axis = 2 if features == 1 and x.ndim > 2 else axis
    if x.is_meta or not x.is_floating_point() or x.shape[axis] < 2:
        return None
    changed = x.detach().clone()
    changed.select(axis, 0).normal_()
    with torch.no_grad(), contextlib.suppress(Exception):
        results = [_rerun(call, value) for value in (x.detach(), changed)]
        one, other = (r.narrow(axis, 1, r.shape[axis] - 1) for r in results)
        return not torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    return None


def _rerun(call: ModuleCall, x: Tensor) -> Tensor:
    args = tuple(x if a is call.x else a for a in call.args)
    kwargs = {k: x if v is call.x else v for k, v in call.kwargs.items()}
    result = call.module(*args, **kwargs)
    return result if isinstance(result, Tensor) else next(r for r in result if isinstance(r, Tensor))
