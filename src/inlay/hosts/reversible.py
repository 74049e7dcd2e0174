"""The host on a module that runs its blocks without gradients, and again in a backward pass of its own.

Reversible layers do so to keep no activations. Such a backward pass runs only if a tensor that the module is given asks
for a gradient; autograd does not see that parameters in the blocks do. In a frozen model nothing asks: the host does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from inlay.anatomy.probe import tensors_in
from inlay.anatomy.tree import inside
from inlay.errors import AttachmentError, TrainingError
from inlay.hosts.base import Host, Hosted, adopt
from inlay.route import Group


class ReversibleHost(Host):
    """Swapped in as the class of the module around such blocks while the model has adapters."""

    training: bool

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> bool | None:
        """Whether active adapters have pieces in the blocks; None where none is active."""
        found = [state.around[name] for g in groups for name in g.names if name in state.around]
        return any(found) if found else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own result, with a gradient where pieces in the blocks need one."""
        plan = self._inlay.plan
        if plan is None or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if plan:
            args, kwargs = _asking(args, kwargs)
        result = super().forward(*args, **kwargs)  # type: ignore[misc]
        for node in {t.grad_fn for t in tensors_in(result) if t.grad_fn is not None}:
            node.register_prehook(functools.partial(_check_mode, self, self.training))
        return result


def surround(modules: dict[str, nn.Module], path: str, adapter: str, leaves: list[str]) -> nn.Module:
    """Makes the module at `path` such a host, for an adapter with pieces at these leaves.

    Raises:
        AttachmentError: the module is the model itself, or hosts pieces.
    """
    if not path:
        raise AttachmentError(
            f"{type(modules[path]).__name__} itself runs its blocks again in a backward pass of its own, so nothing "
            "can be put around them. Move the blocks and that function into a module of the model."
        )
    adopt(modules[path], ReversibleHost, path).around[adapter] = any(inside(leaf, path) for leaf in leaves)
    return modules[path]


def _asking(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, the first tensor of numbers with a gradient: that is what blocks pass on."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    key = next((k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if key is not None and not named[key].requires_grad:
        named[key] = named[key].detach().requires_grad_()
    return tuple(named[i] for i in range(len(args))), {k: named[k] for k in kwargs}


def _check_mode(module: ReversibleHost, trained: bool, *_: Any) -> None:
    """Before the backward pass.

    Raises:
        TrainingError: the module was, or is, in evaluation mode.
    """
    if not (trained and module.training):
        raise TrainingError(
            f"{module._inlay.path} runs its blocks again in a backward pass of its own. It is trained in training mode "
            f"only, where such modules keep the random numbers of the first pass, and it {'is' if trained else 'ran'} "
            "in evaluation mode. Call model.train() before the forward pass."
        )


__all__ = ["ReversibleHost", "surround"]
