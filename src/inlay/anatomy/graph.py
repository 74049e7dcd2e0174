"""What one run of the model left behind: calls of modules, and the autograd graph between them.

Each projection's output is cut loose from the graph and remembered, so that walking back from any tensor ends at the
calls that it was computed from. Walks also end where a block of the model gave its output: that is the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from inlay.anatomy.base import Axis, Columns, Kind
from inlay.anatomy.tree import inside

Node: TypeAlias = Any
"""A node of the autograd graph; torch gives these no common public type."""


@dataclass(eq=False)
class Call:
    """One call of something: what it was given first, what it gave first, and its place in the order of calls."""

    path: str
    order: int
    x: Tensor
    y: Tensor


@dataclass(eq=False)
class LeafCall(Call):
    """A call of a leaf.

    `cut` is its output as the start of a new graph, None where it is not cut (norms); `others` and
    `results` are further tensors that it was given and gave; `axis` is where x and y have their features.
    """

    kind: Kind = "linear"
    axis: Axis = -1
    cut: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    results: tuple[Tensor, ...] = ()


@dataclass(eq=False)
class ModuleCall(Call):
    """A call of a module with children, or of one without parameters."""

    module: nn.Module = field(default_factory=nn.Identity)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class AttentionCall(Call):
    """A call of the attention function: x is the query, y the result."""

    k: Tensor = field(default_factory=lambda: torch.empty(0))
    v: Tensor = field(default_factory=lambda: torch.empty(0))
    causal: bool = False
    window: int | None = None
    others: tuple[Tensor, ...] = ()

    @property
    def q(self) -> Tensor:
        """The query, [B, H, T, D]."""
        return self.x


@dataclass
class Trace:
    """Everything that one run showed, in order.

    Calls without gradients are `silent`. Some models make them first and again with gradients; of others they are all
    that there is, and `settle` takes them in.
    """

    batch: int = 1
    leaves: list[LeafCall] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    silent: list[LeafCall | ModuleCall] = field(default_factory=list)
    bypassed: set[str] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    stops: dict[Node, Call] = field(default_factory=dict)
    norms: dict[Node, LeafCall] = field(default_factory=dict)
    dropouts: dict[int, ModuleCall] = field(default_factory=dict)
    times: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _walked: dict[tuple[Node, bool], tuple[Call, ...]] = field(default_factory=dict)
    _users: dict[int, list[Call]] | None = None
    _takers: dict[int, list[LeafCall]] | None = None

    def settle(self) -> None:
        """Counts silent calls of whatever never ran otherwise."""
        known = {c.path for c in (*self.leaves, *self.modules)}
        for call in self.silent:
            if call.path not in known:
                known.add(call.path)
                if isinstance(call, LeafCall):
                    self.leaves.append(call)
                else:
                    self.modules.append(call)

    def sources(self, tensor: Tensor, *, stop_at_norms: bool = False) -> tuple[Call, ...]:
        """The nearest calls that a tensor was computed from: of leaves, of the attention function, of blocks.

        Args:
            tensor: any tensor of the run.
            stop_at_norms: end at norms too, instead of passing through them.
        """
        return self.behind(tensor.grad_fn, stop_at_norms)

    def behind(self, node: Node | None, stop_at_norms: bool = False) -> tuple[Call, ...]:
        """`sources`, from a node of the graph."""
        if node is None:
            return ()
        key = node, stop_at_norms
        if key not in self._walked:
            found: dict[int, Call] = {}
            for end in self._ends(node, stop_at_norms):
                found[id(end)] = end
            self._walked[key] = tuple(sorted(found.values(), key=lambda c: c.order))
        return self._walked[key]

    def mark(self, call: ModuleCall) -> None:
        """Ends later walks at the result of a call."""
        node = call.y.grad_fn
        self.stops[node] = call
        for norms in (False, True):
            self._walked.pop((node, norms), None)

    def _ends(self, start: Node, stop_at_norms: bool) -> Iterator[Call]:
        seen: set[Node] = set()
        todo = [start]
        stops, norms = self.stops, self.norms
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if stop_at_norms and node in norms:
                yield norms[node]
            elif node in stops:
                yield stops[node]
            else:
                todo += [following for following, _ in node.next_functions]

    def inputs(self, call: Call) -> tuple[Call, ...]:
        """What a call read, norms counting as calls: behind the x of a leaf, behind the result of a block."""
        if isinstance(call, LeafCall):
            return self.sources(call.x, stop_at_norms=True)
        node = call.y.grad_fn
        if node in self.norms:
            return (self.norms[node],)
        following = () if node is None else node.next_functions
        return tuple(c for n, _ in following for c in self.behind(n, True))

    def users(self, call: Call) -> list[Call]:
        """The leaves, norms and blocks that read a call's result with nothing in between."""
        if self._users is None:
            self._users = {}
            for reader in [
                *self.leaves,
                *{id(c): c for c in self.stops.values() if isinstance(c, ModuleCall)}.values(),
            ]:
                for source in self.inputs(reader):
                    self._users.setdefault(id(source), []).append(reader)
        return self._users.get(id(call), [])

    def takers(self, call: Call) -> list[LeafCall]:
        """The leaves that read a call's result, norms in between or not."""
        if self._takers is None:
            self._takers = {}
            for reader in self.leaves:
                for source in self.sources(reader.x):
                    self._takers.setdefault(id(source), []).append(reader)
        return self._takers.get(id(call), [])

    def reaching(self) -> set[str]:
        """Paths of the leaves and attentions that the model's output depends on, as far as gradients tell.

        A leaf that is not among them cannot be trained: what it computes only chooses (top-k), or is not used. Silent
        calls count where the model has a backward pass of its own, which may well run them again.
        """
        found: set[str] = set()
        own_backward = False
        seen: set[Node] = set()
        uncut = {t.grad_fn: c.path for c in self.leaves if c.cut is None for t in (c.y, *c.results)}
        todo = [t.grad_fn for t in self.outputs]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            own_backward = own_backward or isinstance(node, BackwardCFunction)
            if node in uncut:
                found.add(uncut[node])
            call = self.stops.get(node)
            if isinstance(call, LeafCall):
                found.add(call.path)
                todo += [t.grad_fn for t in (call.x, *call.others)]
            elif isinstance(call, AttentionCall):
                found.add(call.path)
                todo += [t.grad_fn for t in (call.q, call.k, call.v, *call.others)]
            else:
                todo += [following for following, _ in node.next_functions]
        return found | {c.path for c in self.silent} if own_backward else found

    def reruns(self) -> tuple[str, ...]:
        """Modules that run what is inside them without gradients, and again in a backward pass of their own."""
        silent = {id(c) for c in self.silent}
        heard = {c.path: c for c in self.modules if id(c) not in silent}
        trained = {c.path for c in self.leaves if id(c) not in silent}
        unheard = {c.path for c in self.silent if isinstance(c, LeafCall)} - trained
        nearest = {max((p for p in heard if inside(path, p)), key=len, default=None) for path in unheard}
        return tuple(p for p, c in heard.items() if p in nearest and _has_own_backward(c))

    def comes_from_within(self, call: Call, path: str) -> bool:
        """Whether all of a call's output was computed by leaves inside a module, with nothing passed around them."""
        sources = self.sources(call.y)
        return bool(sources) and all(_is_part(c, path) for c in sources)

    def enters(self, call: LeafCall) -> tuple[Call, ...]:
        """What a leaf reads, as long as it is other leaves alone: () where the residual stream is part of it."""
        sources = self.sources(call.x)
        return sources if all(isinstance(c, LeafCall) for c in sources) else ()


def _has_own_backward(call: ModuleCall) -> bool:
    """Whether a step whose backward pass is not torch's own leads from what a module is given to what it gives."""
    seen: set[Node] = {None, *(t.grad_fn for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor))}
    todo: list[Node] = [call.y.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False


def _is_part(call: Call, path: str) -> bool:
    return not isinstance(call, ModuleCall) and (call.path == path or inside(call.path, path))


def used_columns(leaf: LeafCall, part: Tensor) -> Columns | None:
    """Which output features of a leaf reach a tensor, as ranges; None where all of them do.

    The gradient of the tensor with respect to the leaf's output is non-zero exactly at the features it was made from.
    """
    if leaf.cut is None or part.is_meta:
        return None
    seed = torch.randn(part.shape, dtype=part.dtype, device=part.device)
    (grad,) = torch.autograd.grad(part, leaf.cut, seed, retain_graph=True, allow_unused=True)
    return None if grad is None else _nonzero(leaf, grad)


def reaching(leaf: LeafCall, node: Node) -> Columns | None:
    """`used_columns` for a tensor of which only the node in the graph is known: one step follows its gradient."""
    if leaf.cut is None or leaf.cut.is_meta or leaf.y.grad_fn is None:
        return None
    edge = torch.autograd.graph.GradientEdge(node, 0)
    (meta,) = node._input_metadata[:1]
    seed = torch.randn(meta.shape, dtype=meta.dtype, device=meta.device)
    (grad,) = torch.autograd.grad((edge,), leaf.cut, (seed,), retain_graph=True, allow_unused=True)
    return None if grad is None else _nonzero(leaf, grad)


def _nonzero(leaf: LeafCall, grad: Tensor) -> Columns | None:
    grad = grad.movedim(leaf.axis, -1)
    used = grad.reshape(-1, grad.shape[-1]).ne(0).any(0).tolist()
    return None if all(used) or not any(used) else _ranges(used)


def _ranges(used: list[bool]) -> Columns:
    ranges, start = [], None
    for i, flag in enumerate([*used, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            ranges.append((start, i))
            start = None
    return tuple(ranges)


def later(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns], true where a key comes after the query, both ending together.

    `triu` would start threads for these few numbers, and wait for them where the machine is busy.
    """
    last = torch.arange(rows, device=device) + columns - rows
    return torch.arange(columns, device=device) > last[:, None]


def depth(tensor: Tensor, call: LeafCall) -> int:
    """How many nodes of the graph lie between a tensor and a call that it was computed from, at most."""
    todo: list[tuple[Node, int]] = [(tensor.grad_fn, 0)]
    target = call.y.grad_fn
    best = 0
    while todo:
        node, steps = todo.pop()
        if node is None:
            continue
        if node is target:
            best = max(best, steps)
        todo += [(following, steps + 1) for following, _ in node.next_functions]
    return best
