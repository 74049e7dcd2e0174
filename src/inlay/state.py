"""What inlay knows about one model: its adapters, its hosts, and the route that is in force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.errors import AdapterError, nearest
from inlay.hosts.base import Host
from inlay.hosts.embedding import Serving, serving
from inlay.hosts.model import hosts_rows
from inlay.hosts.rerun import Plans
from inlay.padding import Padding
from inlay.route import Group, Names, RowSpec, as_names, everyone, per_row

if TYPE_CHECKING:
    from inlay.adapter import Adapter

STATE = "_inlay_state"


@dataclass(eq=False)
class State:
    """Everything inlay knows about one model; it lives on the model and is copied and pickled with it."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    hosts: dict[str, nn.Module] = field(default_factory=dict)
    frozen: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    groups: tuple[Group, ...] = field(default_factory=lambda: everyone(()))
    batch: int | None = None
    fingerprint: dict[str, Any] | None = None
    merged: list[str] = field(default_factory=list)
    padding: Padding = field(default_factory=Padding)
    serving: Serving | None = None
    rerunning: Plans | None = None

    def activate(self, groups: tuple[Group, ...], batch: int | None = None) -> None:
        """Makes these groups the route: every host plans once, no host decides anything during a forward pass.

        All plans are made before any takes effect, so a refused route leaves the present one in force. Merged adapters
        are in the weights and so on every row, before all others.
        """
        if self.merged:
            first = tuple(self.merged)
            groups = tuple(Group(first + tuple(n for n in g.names if n not in first), g.rows) for g in groups)
        self.rerunning = None
        plans = [(module, type(module).make_plan(module._inlay, groups)) for module in self._hosted()]
        for module, plan in plans:
            module._inlay.plan = plan
        self.serving = serving(plans)
        self.groups, self.batch = groups, batch

    def _hosted(self) -> Iterator[Any]:
        return (module for module in self.hosts.values() if isinstance(module, Host))

    @property
    def active(self) -> Names:
        """The adapters that act on at least one row."""
        return tuple(dict.fromkeys(name for g in self.groups for name in g.names))


def state_of(model: nn.Module) -> State | None:
    """What inlay knows about a model, or None where no adapter was ever attached."""
    found = model.__dict__.get(STATE)
    return found if isinstance(found, State) else None


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapters on a model, by name, in the order in which they were attached."""
    state = state_of(model)
    return dict(state.adapters) if state is not None else {}


def use(model: nn.Module, rows: RowSpec | Sequence[RowSpec]) -> Use:
    """Chooses what acts from now on, or within a `with` block.

    Args:
        model: a model with adapters.
        rows: a name, a tuple of names (all of them, in this order, on every row), None or () for the base alone, or a
            list with one such entry per row of the batch.

    Raises:
        AdapterError: an unknown name; the message says which row.
    """
    state = require(model)
    if isinstance(rows, list):
        groups, batch = per_row(rows), len(rows)
        if not rows:
            raise AdapterError("use() got an empty list: give one adapter name, tuple of names, or None per row.")
    else:
        groups, batch = everyone(as_names(rows, "use()")), None  # type: ignore[arg-type]
    for group in groups:
        for name in group.names:
            if name not in state.adapters:
                at = "" if group.rows.index is None else f" (row {group.rows.index[0]})"
                at = f" (row {rows.index(name)})" if isinstance(rows, list) and name in rows else at
                raise AdapterError(f"no adapter {name!r} on this model{at}: {nearest(name, state.adapters)}")
    _refuse_without_merged(state, groups)
    before = state.groups, state.batch
    state.activate(groups, batch)
    if batch is not None or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        hosts_rows(model)  # it sees that blocks which run again do so with the plans of their own pass
    return Use(state, before)


def _refuse_without_merged(state: State, groups: tuple[Group, ...]) -> None:
    """A merged adapter acts on every row, whatever is asked for; so a route must say that it does."""
    count = len(state.merged)
    for group in groups:
        if set(group.names[:count]) != set(state.merged):
            rows = "" if group.rows.index is None else f" (row {group.rows.index[0]})"
            raise AdapterError(
                f"use() was given {group.names or None!r}{rows}, but {tuple(state.merged)} are merged into the weights "
                "and act on every row, before all others. Name them first in every row, or unmerge() them."
            )


class Use:
    """The route set by `use`; as a context manager it puts the former one back."""

    def __init__(self, state: State, before: tuple[tuple[Group, ...], int | None]) -> None:
        self._state = state
        self._before = before

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        groups, batch = self._before
        known = self._state.adapters
        kept = tuple(Group(tuple(n for n in g.names if n in known), g.rows) for g in groups)
        self._state.activate(kept, batch)


def require(model: nn.Module) -> State:
    """The state of a model that has adapters.

    Raises:
        AdapterError: it has none.
    """
    state = state_of(model)
    if state is None:
        raise AdapterError(
            f"no adapter is attached to this {type(model).__name__}; inlay.attach() or inlay.load() comes first."
        )
    return state


def known_name(state: State, name: str) -> None:
    """Refuses a name that no adapter of the model has."""
    if name not in state.adapters:
        raise AdapterError(f"no adapter {name!r} on this model: {nearest(name, state.adapters)}")
