"""AdaLoRA's budget: which triplets of all sites together are kept at each step.

Legend: R initial rank of a site, N triplets of all sites.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.errors import MethodError
from inlay.stepping import Stepped, watch

if TYPE_CHECKING:
    from inlay.methods.adalora import AdaLoRA, AdaLoRADelta

FACTORS = ("P", "Lambda", "Q")


class Budget(Stepped, nn.Module):
    """Scores, allocation and penalty for the pieces of one adapter; all its state is buffers.

    It is a module of the first piece, so that it is saved, moved and copied with the adapter.
    """

    def __init__(self, pieces: tuple[AdaLoRADelta, ...], method: AdaLoRA) -> None:
        super().__init__()
        # A tuple is no module: the pieces are used here and registered where they are placed.
        self.pieces, self.method = pieces, method
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("total_steps", torch.zeros((), dtype=torch.long))
        if method.total_steps is not None:
            self.begin(method.total_steps)
        watch(self)

    step: Tensor
    total_steps: Tensor

    def begin(self, total_steps: int) -> None:
        """Sets T, the number of optimizer steps of the whole run.

        Raises:
            MethodError: the method was given another number, or warm-up and final phase leave no step between them.
        """
        wanted = self.method.total_steps
        if wanted is not None and wanted != total_steps:
            raise MethodError(
                f"AdaLoRA(total_steps={wanted}), but the run has {total_steps} optimizer steps: the budget would not "
                "reach its target at the right time. Leave total_steps out, or make them equal."
            )
        phases(self.method, total_steps)
        self.total_steps.fill_(total_steps)

    @property
    def initial(self) -> int:
        """b0, the number of triplets at the start."""
        return sum(p.kept.numel() for p in self.pieces)

    @property
    def target(self) -> int:
        """b_T, the number of triplets at the end."""
        return self.method.target_rank * len(self.pieces)

    def stepped_parameters(self) -> Iterator[nn.Parameter]:
        return (getattr(piece, name) for piece in self.pieces for name in FACTORS)

    def before_step(self, grad_scale: Tensor | float) -> None:
        total = int(self.total_steps)
        if not total:
            raise MethodError(
                "AdaLoRA must know how many optimizer steps the run has before the first one: its budget falls over "
                "them. Give AdaLoRA(total_steps=...), or call inlay.methods.adalora.set_total_steps(adapter, n) "
                "before training."
            )
        self._add_penalty(grad_scale)
        if self.method.follow == "paper":
            self._score(grad_scale, int(self.step) + 1, total)

    def after_step(self, grad_scale: Tensor | float) -> None:
        self.step += 1
        t, total = int(self.step), int(self.total_steps)
        if self.method.follow == "code":
            self._score(grad_scale, t, total)
        budget, due = allocation(self.method, t, total, self.initial, self.target)
        if due:
            self._allocate(budget, fixed=t > total - phases(self.method, total)[1])

    def _add_penalty(self, grad_scale: Tensor | float) -> None:
        """Adds the gradient of γ mean ‖PᵀP - 1‖ over all P and Q; of γ Σ ‖PᵀP - 1‖² where the paper is followed."""
        gamma, paper = self.method.orthogonality, self.method.follow == "paper"
        if not gamma:
            return
        for piece in self.pieces:
            for parameter, tall in ((piece.P, piece.P), (piece.Q, piece.Q.mT)):
                if not parameter.requires_grad:
                    continue
                gram_RR = tall.mT @ tall
                gram_RR.diagonal().sub_(1.0)
                if paper:
                    grad = 4 * gamma * (tall @ gram_RR)
                else:
                    # At exactly orthogonal columns the norm has no gradient; zero is a subgradient.
                    norm = gram_RR.norm().clamp_min(torch.finfo(gram_RR.dtype).tiny)
                    grad = 2 * gamma / (2 * len(self.pieces)) / norm * (tall @ gram_RR)
                grad = (grad if parameter is piece.P else grad.mT) * grad_scale
                parameter.grad = grad.clone() if parameter.grad is None else parameter.grad.add_(grad)

    def _score(self, grad_scale: Tensor | float, t: int, total: int) -> None:
        if t >= total - phases(self.method, total)[1]:
            return
        beta1, beta2 = self.method.beta1, self.method.beta2
        for piece in self.pieces:
            for name in FACTORS:
                parameter = piece.get_parameter(name)
                if parameter.grad is None:
                    now = torch.zeros_like(parameter)
                else:
                    now = (parameter.detach() * (parameter.grad / grad_scale)).abs()
                mean, spread = piece.get_buffer(f"sensitivity_{name}"), piece.get_buffer(f"uncertainty_{name}")
                mean.mul_(beta1).add_(now, alpha=1 - beta1)
                spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def scores(self) -> list[Tensor]:
        """S of every triplet, (R,) for each site."""
        found = []
        for piece in self.pieces:
            s = {n: piece.get_buffer(f"sensitivity_{n}") * piece.get_buffer(f"uncertainty_{n}") for n in FACTORS}
            found.append(s["Lambda"] + s["P"].mean(0) + s["Q"].mean(1))
        return found

    def _allocate(self, budget: int, fixed: bool) -> None:
        """Zeroes Λ of all but the `budget` best triplets; ties with the best of the losers lose, as in the code."""
        losers = self.initial - budget
        if losers <= 0:
            return
        if not fixed:
            scores = self.scores()
            device = scores[0].device
            threshold = torch.cat([s.to(device) for s in scores]).kthvalue(losers).values
            for piece, score in zip(self.pieces, scores, strict=True):
                piece.kept.copy_(score > threshold.to(score.device))
        for piece in self.pieces:
            piece.Lambda.masked_fill_(~piece.kept, 0.0)


def phases(method: AdaLoRA, total_steps: int) -> tuple[int, int]:
    """ti and tf, the steps before the budget falls and those after it has fallen.

    Raises:
        MethodError: they leave no step between them.
    """
    ti, tf = (
        length if isinstance(length, int) else math.floor(length * total_steps)
        for length in (method.warmup, method.final)
    )
    if ti + tf >= total_steps:
        raise MethodError(
            f"AdaLoRA's budget falls between its first {ti} steps (warmup={method.warmup}) and its last {tf} "
            f"(final={method.final}), but the run has only {total_steps}. Train longer, or shorten them."
        )
    return ti, tf


def allocation(method: AdaLoRA, t: int, total_steps: int, initial: int, target: int) -> tuple[int, bool]:
    """b(t) after step t of T, counted from 1, and whether triplets are zeroed at that step.

    b = b0                                                    t ≤ ti
    b = b_T + (b0 - b_T) (1 - (t - ti) / (T - tf - ti))³      every `interval` steps
    b = b_T                                                   t ≥ T - tf, at every step
    """
    ti, tf = phases(method, total_steps)
    if t <= ti:
        return initial, False
    if t >= total_steps - tf:
        return target, True
    rest = 1 - (t - ti) / (total_steps - tf - ti)
    return int(target + (initial - target) * rest**3), t % method.interval == 0
