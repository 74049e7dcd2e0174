"""The host on a module with one tensor in and one tensor out: projections, norms, embeddings, dropouts, expert blocks.

What it does, in this order, for the rows of each group: remember x for the spans that begin here; add the deltas that
act on what enters; call the frozen module, or its replacement; run it again for deltas that go through it; add the
deltas that act on what leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.anatomy.base import Columns
from inlay.errors import AdapterError
from inlay.hosts.base import Host, Hosted, Placed, Span, padding_of
from inlay.methods.base import Delta, Fused, Replacement, Rowwise
from inlay.padding import Padding
from inlay.route import Group, Rows, join

Frozen = Callable[[Tensor], Any]

FRESH = (nn.Linear.forward,)
"""Forwards whose result nobody else holds."""


@dataclass(eq=False)
class Act:
    """One delta at work: where its x comes from, which features it writes, and which axis holds the features."""

    delta: Delta
    span: Span | None
    columns: Columns | None
    axis: int = -1

    def __call__(self, x: Tensor, y: Tensor, frozen: Tensor | None = None) -> Tensor:
        """y with Δ added, in the dtype of y; `frozen` is the module's own output where others were added before."""
        if self.axis == -1:
            return self._added(x, y, frozen)
        frozen = None if frozen is None else frozen.movedim(self.axis, -1)
        out = self._added(x.movedim(self.axis, -1), y.movedim(self.axis, -1), frozen).movedim(-1, self.axis)
        # What comes after may round otherwise on another layout, even if that differs in axes of one entry alone.
        other = y.is_contiguous() and out.stride() != y.stride()
        return out.clone(memory_format=torch.contiguous_format) if other else out

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """Δ alone, of the shape of x, for a module that runs again on x + Δ."""
        if self.axis == -1:
            return self.delta(x, y)  # type: ignore[no-any-return]
        moved: Tensor = self.delta(x.movedim(self.axis, -1), y.movedim(self.axis, -1))
        return moved.movedim(-1, self.axis)

    def _added(self, x: Tensor, y: Tensor, frozen: Tensor | None) -> Tensor:
        x = _beside(x, y)
        seen = frozen if frozen is not None and self.delta.needs_frozen else y
        if self.columns is not None:
            out = add_columns(y, self.delta(x, take_columns(seen, self.columns)), self.columns)
        elif seen is y:
            out = self.delta.add(x, y)
        else:
            out = y + self.delta(x, seen)
        return out if out.dtype == y.dtype else out.to(y.dtype)


@dataclass(eq=False)
class Acts:
    """Everything one group of rows needs at one module."""

    rows: Rows
    entering: tuple[Act, ...] = ()
    replacement: Replacement | None = None
    through: tuple[Act, ...] = ()
    leaving: tuple[Act, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether these rows get the frozen module's output as it is."""
        return not (self.entering or self.replacement or self.through or self.leaving)


@dataclass(eq=False)
class Plan:
    """What a hosted leaf does under the present route; `whole` where one group has all rows, whatever their number."""

    opens: tuple[Span, ...]
    groups: tuple[Acts, ...]
    joins: tuple[Group, ...]
    whole: bool = True
    total: int = 0
    padding: Padding | None = None
    together: tuple[Together, ...] = ()
    fused: Fused | None = None


@dataclass(eq=False)
class Together:
    """The pieces of one kind at this module, of all groups, in one step."""

    rows: Rowwise
    columns: Columns | None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """y with each row's Δ added."""
        if self.columns is None:
            out: Tensor = self.rows(x, y)
            return out
        part = take_columns(y, self.columns)
        return add_columns(y, self.rows(x, part) - part, self.columns)


def take_columns(y: Tensor, columns: Columns) -> Tensor:
    """The features of y in these ranges."""
    if len(columns) == 1:
        (lo, hi), = columns  # fmt: skip
        return y[..., lo:hi]
    return torch.cat([y[..., lo:hi] for lo, hi in columns], dim=-1)


def add_columns(y: Tensor, delta: Tensor, columns: Columns) -> Tensor:
    """y with delta added to the features in these ranges; the others keep their bits."""
    if len(columns) == 1:
        (lo, hi), = columns  # fmt: skip
        return y + F.pad(delta, (lo, y.shape[-1] - hi))
    index = torch.cat([torch.arange(lo, hi, device=y.device) for lo, hi in columns])
    return y.index_add(-1, index, delta.to(y.dtype))


class LeafHost(Host):
    """Serves `Delta` and `Replacement` pieces."""

    training: bool

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> Plan | None:
        """The acts of each group at this module, in the order in which the adapters are named."""
        active = {name for g in groups for name in g.names}
        opens = tuple(s for name, spans in state.opens.items() if name in active for s in spans)
        acts = tuple(_acts(state, g) for g in groups)
        if not opens and all(a.idle for a in acts):
            return None
        whole = groups[0].rows.index is None
        if len(groups) > 1:
            _refuse_routed(state, active)
        together = () if whole or opens else _together(state, groups, cls.base.forward in FRESH)
        fused = None if opens else _fused(acts, cls.base)
        return Plan(opens, acts, groups, whole, groups[0].rows.total, padding_of(state), together, fused)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen module's result with the active pieces applied."""
        plan = self._inlay.plan
        if plan is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if plan.fused is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            y = _eagerly(plan.fused, self, args[0])
            if y is None and self.training and not torch.is_grad_enabled():
                # A pass that runs again for its gradients, perhaps (reversible layers, reentrant checkpointing): the
                # step must drop here what it will drop then.
                with torch.enable_grad():
                    y = _eagerly(plan.fused, self, args[0])
                y = None if y is None else y.detach()
            if y is not None:
                return y
        return _run(plan, super().forward, args, kwargs)  # type: ignore[misc]


def _eagerly(step: Any, module: Any, x: Tensor) -> Tensor | None:
    """`step(module, x)`, a fused step outside of compiled graphs."""
    y: Tensor | None = step(module, x)
    return y


def _leave_to_python() -> None:
    """Keep torch.compile out of `_eagerly` and all that it calls.

    Where it gives up on a model's own frame (another break in the graph, too many shapes) it compiles the frames below
    one by one: fused steps among them, whose caches ask for addresses and versions that no graph can hold. The
    decorator `torch.compiler.disable` would say the same, at the price of importing the compiler, and of a context
    at each call.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(_eagerly.__code__, eval_frame._FrameExecStrategy(skip, skip))


with suppress(ImportError, AttributeError, TypeError):  # no public name: without it only such graphs are lost
    _leave_to_python()


def _acts(state: Hosted, group: Group) -> Acts:
    everything = [p for name in group.names for p in state.placed.get(name, ())]
    placed = [p for p in everything if not p.merged]
    if placed and len(placed) < len(everything):
        _refuse_beside_merged(state, everything)
    deltas = {
        tap: tuple(_act(p) for p in placed if isinstance(p.piece, Delta) and p.site.tap == tap)
        for tap in ("input", "through", "output")
    }
    replacements = [p.piece for p in placed if isinstance(p.piece, Replacement)]
    if len(replacements) > 1:
        raise AdapterError(
            f"the adapters {group.names} each replace {state.path}; on the same rows only one "
            "can. Attach all but one of them with head=None, or use them on different rows."
        )
    replacement = replacements[0] if replacements else None
    if replacement is not None and any(p.piece.needs_frozen for p in placed):
        raise AdapterError(
            f"the adapters {group.names} replace {state.path} and rescale its frozen weight; on the same rows that "
            "contradicts itself. Give one of them other sites."
        )
    return Acts(group.rows, deltas["input"], replacement, deltas["through"], deltas["output"])


def _refuse_beside_merged(state: Hosted, everything: list[Placed]) -> None:
    """A weight with pieces in it gives what the pieces beside it gave, unless one of these ignores that weight."""
    for placed in everything:
        ignores = isinstance(placed.piece, Replacement) or placed.site.tap == "through" or placed.stale
        if (ignores and not placed.merged) or (placed.merged and placed.site.tap == "input"):
            raise AdapterError(
                f"{state.path} holds a merged adapter, beside which a {type(placed.piece).__name__} of another would "
                "not act as it does unmerged. Unmerge first, or use them one at a time."
            )


def _together(state: Hosted, groups: tuple[Group, ...], fresh: bool) -> tuple[Together, ...]:
    """One step for each kind of piece, where the rows have nothing here but pieces whose class offers that.

    A step is made from all adapters of the model, not only from those in use, so that another composition of the batch
    is the same program with another index.
    """
    slots: dict[tuple[type[Delta], Columns | None, int], dict[str, Delta]] = {}
    for name, pieces in state.placed.items():
        seen: dict[tuple[type[Delta], Columns | None], int] = {}
        for placed in pieces:
            piece, columns = placed.piece, placed.site.columns
            usual = placed.site.tap == "output" and placed.site.axis == -1 and not (placed.span or placed.merged)
            if not isinstance(piece, Delta) or not usual:
                if any(name in g.names for g in groups):
                    return ()
                continue
            kind = type(piece), columns
            seen[kind] = seen.get(kind, -1) + 1
            slots.setdefault((*kind, seen[kind]), {})[name] = piece
    made = []
    for (cls, columns, _), deltas in slots.items():
        index = [-1] * groups[0].rows.total
        names = list(deltas)
        for group in groups:
            own = [n for n in group.names if n in deltas]
            if len(own) > 1:
                return ()
            for row in (group.rows.index or ()) if own else ():
                index[row] = names.index(own[0])
        if max(index) < 0:
            continue
        rows = cls.together(list(deltas.values()), index)
        if rows is None:
            return ()
        rows.fresh = columns is None and fresh
        made.append(Together(rows, columns))
    return tuple(made)


def _fused(groups: Sequence[Acts], base: type[nn.Module]) -> Fused | None:
    """The module and its pieces in one step, where all of them only add to what leaves it and are of one class."""
    acts = [(act, group.rows) for group in groups for act in group.leaving]
    alone = not any(group.entering or group.replacement or group.through for group in groups)
    alone = alone and not any(act.span or act.axis != -1 or not rows.contiguous for act, rows in acts)
    deltas = [act.delta for act, _ in acts]
    if not alone or len({type(d) for d in deltas}) != 1:
        return None
    rows = None if groups[0].rows.index is None else [rows for _, rows in acts]
    return deltas[0].fused(deltas, [act.columns for act, _ in acts], base, rows)


def _act(placed: Placed) -> Act:
    assert isinstance(placed.piece, Delta)
    return Act(placed.piece, placed.span, placed.site.columns, placed.site.axis)


def _refuse_routed(state: Hosted, active: set[str]) -> None:
    for placed in (p for name, pieces in state.placed.items() if name in active for p in pieces):
        if placed.site.rows != "first":
            raise AdapterError(
                f"{state.path} sees tokens without the row they belong to, so rows cannot differ in adapters there. "
                "Use sites that see whole rows (for example 'attn.q', 'ffn'), or one adapter for all rows."
            )


def _run(plan: Plan, frozen: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        name, x, rest = None, args[0], args[1:]
    else:
        name, rest = next(iter(kwargs)), ()
        x = kwargs[name]
        kwargs = {k: v for k, v in kwargs.items() if k != name}

    def base(value: Tensor) -> Any:
        return frozen(value, *rest, **kwargs) if name is None else frozen(**{name: value}, **kwargs)

    for span in plan.opens:
        span.x = x
    if plan.whole:
        return _one(plan.groups[0], base, x, rest, kwargs)
    return _many(plan, base, x, rest, kwargs)


def _one(acts: Acts, base: Frozen, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own = acts.replacement

    def call(value: Tensor) -> Any:
        return base(value) if own is None else own(value, *rest, **kwargs)

    for act in acts.entering:
        x = act(_source(act, x), x)
    y, more = _split(call(x))
    if acts.through:
        moved = x
        for act in acts.through:
            moved = moved + act.change(_source(act, x), y)
        y, more = _split(call(moved))
    frozen = y
    for act in acts.leaving:
        y = act(_source(act, x), y, frozen)
    return y if more is None else _rejoined(y, more)


def _many(plan: Plan, base: Frozen, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    total = plan.total
    x = _fit(x, total)
    if plan.together and not any(step.rows.loops for step in plan.together):
        y, more = _split(base(x))
        for step in plan.together:
            out = step(x, y)
            y = out if out.dtype == y.dtype else out.to(y.dtype)
        return y if more is None else _rejoined(y, more)
    # An adapter may serve several groups, beside others in each; its span is taken once for all of them.
    spans = {a.span for g in plan.groups for a in (*g.entering, *g.through, *g.leaving) if a.span}
    sources = {span: span.take() for span in spans}

    def source(act: Act, rows: Rows, own: Tensor) -> Tensor:
        return own if act.span is None else rows.take(sources[act.span])

    xs = [g.rows.take(x) for g in plan.groups]
    for i, group in enumerate(plan.groups):
        _serve(plan, group.rows)
        for act in group.entering:
            xs[i] = act(source(act, group.rows, xs[i]), xs[i])
    if any(g.entering for g in plan.groups):
        x = join(plan.joins, xs)
    y, more = _split(base(x))
    y = _fit(y, total)
    parts = [g.rows.take(y) for g in plan.groups]
    for i, group in enumerate(plan.groups):
        rows, own = group.rows, group.replacement
        _serve(plan, rows)

        def call(value: Tensor, rows: Rows = rows, own: Replacement | None = own) -> Tensor:
            if own is None:
                return _split(base(value))[0]
            some = [_rows_of(a, rows, x.shape[0]) for a in rest]
            named = {k: _rows_of(a, rows, x.shape[0]) for k, a in kwargs.items()}
            return _fit(_split(own(value, *some, **named))[0], value.shape[0])

        if own is not None:
            parts[i] = call(xs[i])
        if group.through:
            moved = xs[i]
            for act in group.through:
                moved = moved + act.change(source(act, group.rows, xs[i]), parts[i])
            parts[i] = call(moved)
        frozen = parts[i]
        for act in group.leaving:
            parts[i] = act(source(act, group.rows, xs[i]), parts[i], frozen)
    _serve(plan, None)
    y = join(plan.joins, parts)
    return y if more is None else _rejoined(y, more)


def _serve(plan: Plan, rows: Rows | None) -> None:
    """Tells pieces that average over tokens whose tokens they are given."""
    if plan.padding is not None:
        plan.padding.rows = rows


def _beside(x: Tensor, y: Tensor) -> Tensor:
    """x with the leading dimensions of y, where a module flattens [B, T, I] to [B*T, O] on its way."""
    flattened = x.ndim != y.ndim and x.is_floating_point() and x.shape[:-1].numel() == y.shape[:-1].numel()
    return x.reshape(*y.shape[:-1], x.shape[-1]) if flattened else x


def _fit(tensor: Tensor, entries: int) -> Tensor:
    """A tensor that all rows share (positions, mostly) once for each row."""
    return tensor.expand(entries, *tensor.shape[1:]) if tensor.shape[0] == 1 and entries > 1 else tensor


def _rows_of(argument: Any, rows: Rows, entries: int) -> Any:
    """The part of a further argument that belongs to these rows, if it has one entry for each entry of x.

    What has one dimension holds positions, which all rows share; there may be as many of them as rows by chance.
    """
    fits = isinstance(argument, Tensor) and argument.ndim > 1 and argument.shape[0] == entries
    return rows.take(argument) if fits else argument


def _source(act: Act, x: Tensor) -> Tensor:
    return x if act.span is None else act.span.take()


def _split(result: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """What a module gives first, and all that it gives where that is more."""
    return (result[0], result) if isinstance(result, tuple) else (result, None)


def _rejoined(y: Tensor, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The result with y in the first place, as the same kind of tuple."""
    parts = y, *result[1:]
    return type(result)._make(parts) if hasattr(result, "_make") else parts


__all__ = ["Act", "Acts", "LeafHost", "Plan", "add_columns", "take_columns"]
