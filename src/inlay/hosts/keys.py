"""What the two hosts on attention modules share: the plan for `ExtraKV` and `HeadDelta` pieces."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.hosts.attend import Acts, Plan
from inlay.hosts.base import Host, Hosted, padding_of
from inlay.methods.base import ExtraKV, HeadDelta
from inlay.route import Group


class KeysHost(Host):
    """Serves `ExtraKV` and `HeadDelta` pieces, in one way or another."""

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> Plan | None:
        """The pieces of each group at this attention, in the order in which the adapters are named."""
        acts = tuple(_acts(state, g) for g in groups)
        return Plan(acts, groups, padding_of(state)) if any(a.kv or a.heads for a in acts) else None


def _acts(state: Hosted, group: Group) -> Acts:
    pieces = [p.piece for name in group.names for p in state.placed.get(name, ())]
    kv = tuple(p for p in pieces if isinstance(p, ExtraKV))
    return Acts(group.rows, kv, tuple(p for p in pieces if isinstance(p, HeadDelta)))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that an attention module reads: its first argument, whatever that is called."""
    x = args[0] if args else kwargs.get("hidden_states")
    found: Tensor = x if x is not None else next(v for v in kwargs.values() if isinstance(v, Tensor))
    return found


__all__ = ["KeysHost", "input_of"]
