"""What acts around every optimizer step, in any training loop: schedules, penalties, and what depends on parameters.

Two hooks on all optimizers of the process are installed when the first piece needs them. Whatever is watched acts
around the steps of exactly those optimizers that hold its parameters, once a step, whether the loop is ours, the
Hugging Face Trainer, or three lines by hand; with gradient accumulation, closures, and gradient scaling.
"""

from __future__ import annotations

import abc
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from inlay.errors import MethodError


class Stepped(abc.ABC):
    """Acts around the optimizer steps that update its parameters. A mix-in for modules; `watch` makes it live.

    Only a weak reference is kept: it ends with the module. A copy or an unpickled one is live as well.
    """

    @abc.abstractmethod
    def stepped_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters whose optimizer counts."""

    def before_step(self, grad_scale: Tensor | float) -> None:
        """When all gradients are there and nothing is updated: penalties add their gradients, times `grad_scale`."""
        del grad_scale

    def after_step(self, grad_scale: Tensor | float) -> None:
        """When the parameters are updated and the gradients, `grad_scale` times too large, are still there."""
        del grad_scale

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        watch(self)


_watched: weakref.WeakSet[Stepped] = weakref.WeakSet()
_prepared: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_steps = 0
_started = False


def start() -> None:
    """Installs the hooks, once."""
    global _started
    if not _started:
        _started = True
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)


def watch(stepped: Stepped) -> None:
    """Lets something act around the steps of its optimizer from now on."""
    start()
    _watched.add(stepped)


def count() -> int:
    """How many optimizer steps were taken in this process; changes whenever parameters may have."""
    return _steps


def prepare(optimizer: Optimizer) -> None:
    """Does now what is due before the next step of an optimizer, which then does not do it again.

    For loops that clip: penalties are part of what is clipped. Call it when all gradients are there, unscaled.
    """
    live = list(_held(optimizer))
    _prepare(optimizer, live)
    if live:
        _prepared.add(optimizer)


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if optimizer in _prepared:
        _prepared.discard(optimizer)
        return None
    live = list(_held(optimizer))
    if not live:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _prepare(optimizer, live)
        return None
    # The gradients are only made inside the step, by the closure.
    wrapped = _after_closure(closure, functools.partial(_prepare, optimizer, live))
    return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})


def _after_closure(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    def both() -> Any:
        loss = closure()
        then()
        return loss

    return both


def _prepare(optimizer: Optimizer, live: list[Stepped]) -> None:
    if _overflown(optimizer):
        return
    for stepped in live:
        if _has_gradients(stepped):
            with torch.no_grad():
                stepped.before_step(_scale(optimizer))


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args, kwargs
    global _steps
    _steps += 1
    live = [s for s in _held(optimizer) if _has_gradients(s)]
    if live and not _overflown(optimizer):
        with torch.no_grad():
            for stepped in live:
                stepped.after_step(_scale(optimizer))


def _held(optimizer: Optimizer) -> Iterator[Stepped]:
    """Everything watched whose parameters this optimizer updates.

    Raises:
        MethodError: it updates only some of them, so that no step of one optimizer is a step of the method.
    """
    if not _watched:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for stepped in list(_watched):
        parameters = [p for p in stepped.stepped_parameters() if p.requires_grad]
        among = sum(id(p) in held for p in parameters)
        if among and among < len(parameters):
            raise MethodError(
                f"{type(stepped).__name__} acts once an optimizer step, but this {type(optimizer).__name__} holds "
                f"{among} of its {len(parameters)} parameters. Give all of them to one optimizer (in several groups, "
                "if they need different settings)."
            )
        if among:
            yield stepped


def _has_gradients(stepped: Stepped) -> bool:
    """Whether this step is one of the adapter: an optimizer may hold several and update one."""
    return any(p.grad is not None for p in stepped.stepped_parameters())


def _scale(optimizer: Optimizer) -> Tensor | float:
    """By how much the gradients are too large: fused optimizers divide by the gradient scaler's factor themselves."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else 1.0


def _overflown(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip this step, or has skipped it, for gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())
