"""What a forward pass ran with, for parts of it that run again during the backward pass (gradient checkpointing).

A pass is planned by `use` before it runs and told its padding as it begins. Run again later, its blocks must find the
plans and the padding of their own pass, not those of a pass that came after it, nor of the route that is in force when
the backward pass begins. So whatever gives a pass its gradient first puts these back; when the backward pass is over,
the present ones return.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

from inlay.anatomy.probe import tensors_in

if TYPE_CHECKING:
    from inlay.state import State

Plans = list[tuple[Any, Any]]


class Pass:
    """One forward pass: the plan of every host, the mask, and the route that they stand for."""

    def __init__(self, state: State, mask: Tensor | None) -> None:
        self.state, self.mask, self.groups = state, mask, state.groups
        self.plans: Plans = [(host, host.plan) for host in _hosts(state)]

    def __call__(self, *_: Any) -> None:
        """Before the first node of this pass in a backward pass."""
        state = self.state
        if state.groups is not self.groups or state.rerunning is not None:
            if state.rerunning is None:
                state.rerunning = [(host, host.plan) for host in _hosts(state)]
                _at_the_end(lambda: restore(state))
            for host, plan in self.plans:
                host.plan = plan
        state.padding.set(self.mask)


def _at_the_end(call: Any) -> None:
    Variable._execution_engine.queue_callback(call)


def remember(state: State, mask: Tensor | None, result: Any) -> None:
    """Ties what a pass runs with to its result."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    nodes = {t.grad_fn for t in tensors_in(result) if t.grad_fn is not None}
    if nodes:
        own = Pass(state, mask)
        for node in nodes:
            node.register_prehook(own)


def restore(state: State) -> None:
    """The plans of the present route, where a backward pass put others in their place (and may have failed)."""
    for host, plan in state.rerunning or ():
        host.plan = plan
    state.rerunning = None


def _hosts(state: State) -> Iterator[Any]:
    return (module._inlay for module in state.hosts.values() if "_inlay" in module.__dict__)
