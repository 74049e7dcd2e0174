"""Optimizers whose state does not have to fit on the device: paged AdamW, and AdamW with 8-bit state.

bitsandbytes pages through CUDA unified memory (arXiv:2305.14314, section 3). `PagedAdamW` does it by hand over plain
memory, so it works wherever torch does, and its result is that of `torch.optim.AdamW` bit for bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from inlay.errors import ConfigError

NAMES = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGN = 4096  # elements; pieces end where vectorised loops do, so that a piece rounds as the whole does


@dataclass(frozen=True)
class _Piece:
    """A parameter, or a range of one, with its gradient and moments on its device."""

    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    step: Tensor
    homes: tuple[Tensor, ...] = ()  # where the moments go back to; empty where they are at home

    @property
    def bytes_each(self) -> int:
        """What the moments of one element occupy."""
        return sum(m.element_size() for m in self.moments)

    @property
    def is_flat(self) -> bool:
        """Whether ranges of all four tensors mean the same elements."""
        return all(t.is_contiguous() for t in (self.parameter, self.gradient, *self.moments))

    def paged(self, span: slice) -> _Piece:
        """A range, or all where memory has gaps, with its moments copied to the device of the parameter."""
        tensors = (self.parameter, self.gradient, *self.moments)
        data, gradient, *homes = (t.view(-1)[span] for t in tensors) if self.is_flat else tensors
        first, second = (home.to(data.device, non_blocking=True, copy=True) for home in homes)
        return _Piece(data, gradient, (first, second), self.step, tuple(homes))


class PagedAdamW(torch.optim.AdamW):
    """AdamW whose moments live in host memory and visit the device for their step.

        m ← β₁m + (1-β₁)g    v ← β₂v + (1-β₂)g²    w ← w - lr·(λw + m̂ / (√v̂ + ε))

    Moments of large parameters are copied to the device, used, and copied back, at most `budget` bytes at a time; a
    parameter whose moments exceed the budget goes in pieces. Moments of small parameters, and of parameters on the
    CPU, stay where the parameter is. The `state_dict` is that of `torch.optim.AdamW`; either loads the other's.

    Args:
        params, lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        budget: bytes of moments on the device at a time.
        page_from: elements from which a parameter's moments are paged; below, copies cost more than they save.

    Source: Dettmers et al. 2023, arXiv:2305.14314; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        budget: int = 256 << 20,
        page_from: int = 100_000,
    ) -> None:
        if budget < 1:
            raise ConfigError(f"budget={budget}: paging needs room for at least one element")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.budget, self.page_from = budget, page_from

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for batch in self._batches(group["params"]):
                _update(batch, group)
        return loss

    def _batches(self, parameters: Iterable[Tensor]) -> Iterator[list[_Piece]]:
        """Pieces that are updated together: resident ones first, then as many as the budget lets in."""
        with_gradient = [p for p in parameters if p.grad is not None]
        for parameter in with_gradient:
            self._start(parameter)
        yield [self._whole(p) for p in with_gradient if not self._pages(p)]
        batch: list[_Piece] = []
        used = 0
        for parameter in (p for p in with_gradient if self._pages(p)):
            whole = self._whole(parameter)
            for span in self._spans(whole):
                cost = (span.stop - span.start) * whole.bytes_each
                if batch and used + cost > self.budget:
                    yield batch
                    batch, used = [], 0
                batch.append(whole.paged(span))
                used += cost
        yield batch

    def _spans(self, whole: _Piece) -> Iterator[slice]:
        """Ranges of a parameter that fit the budget; all of it where its memory has gaps."""
        count = whole.parameter.numel()
        length = max(self.budget // whole.bytes_each // _ALIGN, 1) * _ALIGN if whole.is_flat else count
        return (slice(start, min(start + length, count)) for start in range(0, count, length))

    def _start(self, parameter: Tensor) -> None:
        """Step counter and moments of a parameter that is updated for the first time."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise ConfigError("paged AdamW does not take sparse gradients (an embedding with sparse=True)")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in _MOMENTS:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format, device=self._home(parameter))
                state[name] = self._pinned(zeros, parameter)
        for name in _MOMENTS:  # someone moved the model, or loaded the state in another way
            if state[name].device.type != self._home(parameter).type:
                state[name] = self._pinned(state[name].to(self._home(parameter)), parameter)
        state["step"] += 1

    def _pages(self, parameter: Tensor) -> bool:
        return parameter.device.type != "cpu" and parameter.numel() >= self.page_from

    def _home(self, parameter: Tensor) -> torch.device:
        return torch.device("cpu") if self._pages(parameter) else parameter.device

    def _pinned(self, moment: Tensor, parameter: Tensor) -> Tensor:
        # Only pinned pages are copied while the device computes.
        return moment.pin_memory() if parameter.is_cuda and moment.device.type == "cpu" else moment

    def _whole(self, parameter: Tensor) -> _Piece:
        state = self.state[parameter]
        assert parameter.grad is not None
        return _Piece(parameter, parameter.grad, (state["exp_avg"], state["exp_avg_sq"]), state["step"])

    def state_dict(self) -> dict[str, Any]:
        """The state, once the copies to the host are done."""
        if any(p.is_cuda for group in self.param_groups for p in group["params"]):
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of `torch.optim.AdamW` without moving it to the device as a whole."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own: Iterator[Tensor] = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, own, strict=True):
            if key not in state_dict["state"]:
                continue
            values = state_dict["state"][key]
            state = self.state[parameter]
            state["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device="cpu").clone()
            for name in _MOMENTS:
                moment = values[name].to(self._home(parameter), parameter.dtype, copy=True)
                state[name] = self._pinned(moment, parameter)


def _update(batch: list[_Piece], group: dict[str, Any]) -> None:
    if not batch:
        return
    # torch counts up itself, and pieces of one parameter must all see the same step.
    adamw(
        [piece.parameter for piece in batch],
        [piece.gradient for piece in batch],
        [piece.moments[0] for piece in batch],
        [piece.moments[1] for piece in batch],
        [],
        [piece.step - 1 for piece in batch],
        foreach=group["foreach"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for piece in batch:
        if piece.homes:
            for home, moment in zip(piece.homes, piece.moments, strict=True):
                home.copy_(moment, non_blocking=True)
    batch.clear()  # so that the next batch finds the device empty


def make_adamw(name: str, params: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    """The optimizer of one of `NAMES`.

    `paged_adamw_32bit` is that of bitsandbytes on CUDA where it is installed, else `PagedAdamW`. The 8-bit ones are
    those of bitsandbytes, which has kernels for the CPU as well; there the state is in host memory without paging.

    Args:
        name: one of `NAMES`.
        params: parameters or groups.
        settings: `lr`, `betas`, `eps`, `weight_decay`.

    Raises:
        ConfigError: an unknown name, or 8 bits without bitsandbytes.
    """
    if name not in NAMES:
        raise ConfigError(f"optim={name!r} is not one of {', '.join(NAMES)}")
    groups = list(params)
    tensors = chain.from_iterable(g["params"] if isinstance(g, dict) else [g] for g in groups)
    on_cuda = any(t.is_cuda for t in tensors)
    if name == "paged_adamw_32bit":
        library = _bitsandbytes() if on_cuda else None
        return PagedAdamW(groups, **settings) if library is None else library.optim.PagedAdamW32bit(groups, **settings)
    library = _bitsandbytes()
    if library is None:
        raise ConfigError(
            f"optim: {name} needs bitsandbytes: pip install 'inlay[bnb]'; paged_adamw_32bit works without it"
        )
    if name == "paged_adamw_8bit" and on_cuda:
        return library.optim.PagedAdamW8bit(groups, **settings)  # type: ignore[no-any-return]
    return library.optim.AdamW8bit(groups, **settings)  # type: ignore[no-any-return]


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        return None
