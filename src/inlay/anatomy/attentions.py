"""The attentions of a model: which projections make q, k and v, which one takes the result, and their shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from inlay.anatomy.base import Attention, Columns, Heads, Port
from inlay.anatomy.graph import AttentionCall, Call, LeafCall, used_columns
from inlay.anatomy.spans import after_dropout, norm_after, norm_before
from inlay.anatomy.structure import PATTERNS, Found, attention_before, attention_by_name, heads
from inlay.anatomy.sublayers import Layer, Tree, Unit
from inlay.anatomy.tree import inside

Form = Literal["interface", "softmax", "other"]


@dataclass(eq=False)
class _Seen:
    """An attention, its block, and the calls of its own projections."""

    made: Attention
    layer: str
    calls: list[Call]


class Attentions:
    """All attentions of one trace, by the block they are in."""

    def __init__(self, tree: Tree, layers: Sequence[Layer], config: object) -> None:
        self.tree, self.record, self.config = tree, tree.record, config
        self.paths = sorted((layer.path for layer in layers), key=len, reverse=True)
        self.seen: dict[str, _Seen] = {}
        for call in self.record.attentions:
            if call.path not in self.seen:
                self._add_call(call)
        for layer in layers:
            self._add_by_structure(layer)
        for layer in layers:
            if not self.of(layer):
                self._add_by_name(layer)
            if not self.of(layer):
                self._add_bare(layer)
        self._owned = {c.path for s in self.seen.values() for c in s.calls}

    def of(self, layer: Layer) -> list[Attention]:
        """The attentions of a block, in the order in which they run."""
        own = [s for s in self.seen.values() if s.layer == layer.path]
        return [s.made for s in sorted(own, key=lambda s: min((c.order for c in s.calls), default=0))]

    def owns(self, unit: Unit) -> bool:
        """Whether a sub-layer is an attention, or a part of one."""
        if any(c.path in self._owned for c in unit.calls):
            return True
        around = [s.made.path for s in self.seen.values() if s.made.path != s.layer]
        if unit.path is not None and any(p == unit.path or inside(p, unit.path) for p in around):
            return True
        return any(all(inside(c.path, p) for c in unit.calls) for p in around)

    def _layer_of(self, path: str) -> str | None:
        return next((p for p in self.paths if path == p or inside(path, p)), None)

    def _add_call(self, call: AttentionCall) -> None:
        layer = self._layer_of(call.path)
        if layer is None:
            return
        parts = {"q": call.q, "k": call.k, "v": call.v}
        ports = {name: [c for c in self._projections(t) if inside(c.path, layer)] for name, t in parts.items()}
        ports = {name: self._behind_convolutions(name, calls) for name, calls in ports.items()}
        shapes = Heads(call.q.shape[1], call.k.shape[1], call.k.shape[-1], call.v.shape[-1], call.causal, call.window)
        takers = [c for c in self.record.takers(call) if c.kind in ("linear", "module", "conv")]
        self._add(
            call.path, layer, ports, self._columns(ports, parts), shapes, takers[0] if takers else None, "interface"
        )

    def _projections(self, tensor: Tensor) -> list[LeafCall]:
        return [
            c for c in self.record.sources(tensor) if isinstance(c, LeafCall) and c.kind in ("linear", "module", "conv")
        ]

    def _behind_convolutions(self, name: str, calls: list[LeafCall]) -> list[LeafCall]:
        """The projections before a convolution over neighbouring tokens, which is no projection itself.

        Where it mixes queries and keys, their names tell them apart.
        """
        made = [c for c in calls if c.kind != "conv"]
        todo = [c for c in calls if c.kind == "conv"]
        before: list[LeafCall] = []
        while todo:
            for source in self._projections(todo.pop().x):
                (todo if source.kind == "conv" else before).append(source)
        found = list({id(c): c for c in (*made, *before)}.values())
        if not before or len(found) == len(made):
            return made or calls
        named = [c for c in found if PATTERNS[name].search(c.path.rsplit(".", 1)[-1])]
        return named or found

    def _add_by_structure(self, layer: Layer) -> None:
        for leaf in sorted((c for u in layer.units for c in u.calls), key=lambda c: c.order):
            if any(leaf.path == s.made.o for s in self.seen.values()):
                continue
            found = attention_before(self.record, leaf)
            if found is not None:
                self._add_found(found, layer, "softmax")

    def _add_by_name(self, layer: Layer) -> None:
        groups: dict[str, list[LeafCall]] = {}
        for unit in layer.units:
            for call in unit.calls:
                groups.setdefault(call.path.rpartition(".")[0], []).append(call)
        for calls in groups.values():
            found = attention_by_name(sorted(calls, key=lambda c: c.order))
            if found is not None:
                self._add_found(found, layer, "other")

    def _add_bare(self, layer: Layer) -> None:
        """An attention whose projections are tensors of the module itself, not modules (XLNet): known as a whole."""
        taken = {c.path for unit in layer.units for c in unit.calls}
        for leaf in sorted((c for u in layer.units for c in u.calls), key=lambda c: c.order):
            found = attention_before(self.record, leaf)
            if found is None or found.stack % self.record.batch or not found.stack:
                continue
            around = (c for p, c in self.tree.whole.items() if inside(p, layer.path) and p not in self.tree.calls)
            free = (c for c in around if c.x.shape == c.y.shape and not any(inside(p, c.path) for p in taken))
            path = next((c.path for c in free if self.tree.below.get(c.path)), None)
            if path is not None:
                count = found.stack // self.record.batch
                shapes = Heads(count, count, found.key_size, found.key_size, found.causal)
                made = Attention(path, False, shapes, (), (), (), None, None, path, form="softmax")
                self.seen[path] = _Seen(made, layer.path, [])
                return

    def _add_found(self, found: Found, layer: Layer, form: Form) -> None:
        ports = {"q": list(found.q), "k": list(found.k), "v": list(found.v)}
        ports = {n: [c for c in calls if inside(c.path, layer.path)] for n, calls in ports.items()}
        path = _around([c.path for calls in ports.values() for c in calls])
        if not ports["q"] or path in self.seen:
            return
        if path not in self.tree.whole and path != layer.path:
            path = next((p for p in _ancestors(path) if p in self.tree.whole), layer.path)
        columns = {
            (c.path, n): r for n, calls in ports.items() for c in calls if (r := found.columns(c, n)) is not None
        }
        widths = [sum(_width(c, columns.get((c.path, n))) for c in _once(ports[n])) for n in "qkv"]
        shapes = heads(found, (widths[0], widths[1], widths[2]), self.config)
        self._add(path, layer.path, ports, columns, shapes, found.o, form)

    def _add(
        self,
        path: str,
        layer: str,
        ports: dict[str, list[LeafCall]],
        columns: dict[tuple[str, str], Columns],
        shapes: Heads,
        o: LeafCall | None,
        form: Form,
    ) -> None:
        enter = self._entering(ports["q"][0], path, layer) if ports["q"] else None
        o = self._leaving(o, path, layer) if o else None
        made = Attention(
            path=path,
            cross=bool(ports["q"] and ports["k"]) and self._is_cross(ports["q"], ports["k"], path, layer),
            heads=shapes,
            q=_ports("q", ports, columns),
            k=_ports("k", ports, columns),
            v=_ports("v", ports, columns),
            o=o.path if o else None,
            o_end=after_dropout(self.record, o) if o else None,
            enter=enter.path if enter else path if path in self.tree.whole else o.path if o else path,
            pre_norm=norm_before(self.record, enter.x) if enter else None,
            post_norm=norm_after(self.record, o) if o else None,
            form=form,
        )
        if enter and o and path in self.tree.whole and not self._in_step(enter, o):
            made = dataclasses.replace(made, enter=path, o_end=path)
        calls: list[Call] = [c for group in ports.values() for c in group]
        self.seen[path] = _Seen(made, layer, [*calls, o] if o else calls)

    def _in_step(self, enter: LeafCall, o: LeafCall) -> bool:
        """Whether the two ends of the span ran in turn; where they did not, only the module around them is a span."""
        first, last = self.record.times[enter.path], self.record.times[o.path]
        ran = sorted([(i, "first") for i in first] + [(i, "last") for i in last])
        return [end for _, end in ran] == ["first", "last"] * len(first)

    def _columns(self, ports: dict[str, list[LeafCall]], parts: dict[str, Tensor]) -> dict[tuple[str, str], Columns]:
        """The features of fused projections: of those that feed several parts, or are wider than the part."""
        found: dict[tuple[str, str], Columns] = {}
        shared = [c.path for calls in ports.values() for c in _once(calls)]
        for name, calls in ports.items():
            size = parts[name].shape[1] * parts[name].shape[-1]
            for call in _once(calls):
                if shared.count(call.path) == 1 and _width(call, None) == size:
                    continue
                used = used_columns(call, parts[name])
                if call.y.is_meta and shared.count(call.path) > 1:
                    used = _contiguous(name, call, ports, parts)
                if used is not None:
                    found[call.path, name] = used
        return found

    def _entering(self, leaf: LeafCall, path: str, layer: str) -> LeafCall:
        """Back along the queries to the projection that reads the sub-layer's input."""
        while path != layer:
            before = self.record.sources(leaf.x)
            if not before or not all(isinstance(c, LeafCall) and inside(c.path, path) for c in before):
                break
            first = before[0]
            assert isinstance(first, LeafCall)
            leaf = first
        return leaf

    def _leaving(self, leaf: LeafCall, path: str, layer: str) -> LeafCall:
        """Forward along the result to the last projection of the sub-layer."""
        while path != layer:
            after = [c for c in self.record.takers(leaf) if inside(c.path, path) and len(self.record.sources(c.x)) == 1]
            if not after or after[0].order <= leaf.order:
                break
            leaf = after[0]
        return leaf

    def _is_cross(self, q: list[LeafCall], k: list[LeafCall], path: str, layer: str) -> bool:
        """Cross-attention reads its keys from another tensor than its queries."""
        left = self._entering(q[0], path, layer)
        roots = self._roots(left)
        for port in k:
            right = self._entering(port, path, layer)
            if left is right or left.x is right.x or roots & self._roots(right):
                return False
        return True

    def _roots(self, leaf: LeafCall) -> set[int]:
        """What a leaf reads, looking through modules that only prepare the residual stream."""
        found: set[int] = set()
        for call in self.record.sources(leaf.x):
            through = isinstance(call, LeafCall) and call.kind == "module"
            found |= self._roots(call) if through else {id(call)}  # type: ignore[arg-type]
        return found


def _once(calls: Iterable[LeafCall]) -> list[LeafCall]:
    """The first call of each leaf."""
    return list({c.path: c for c in reversed(list(calls))}.values())[::-1]


def _ports(name: str, ports: dict[str, list[LeafCall]], columns: dict[tuple[str, str], Columns]) -> tuple[Port, ...]:
    return tuple(Port(c.path, columns.get((c.path, name))) for c in _once(ports[name]))


def _width(call: LeafCall, columns: Columns | None) -> int:
    return sum(hi - lo for lo, hi in columns) if columns else int(call.y.shape[call.axis])


def _contiguous(
    name: str, call: LeafCall, ports: dict[str, list[LeafCall]], parts: dict[str, Tensor]
) -> Columns | None:
    """On the meta device there are no values to follow; only the counts matter there, so q | k | v is taken."""
    start = 0
    for other in ("q", "k", "v"):
        size = parts[other].shape[1] * parts[other].shape[-1]
        if other == name:
            return ((start, start + size),) if start + size <= call.y.shape[-1] else None
        if any(c is call for c in ports[other]):
            start += size
    return None


def _around(paths: Iterable[str]) -> str:
    """The innermost module that holds all of these leaves."""
    parents = [p.split(".")[:-1] for p in paths]
    common: list[str] = []
    for words in zip(*parents, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common)


def _ancestors(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[:i]) for i in range(len(words) - 1, 0, -1)]
