"""Learning rate schedules by the names that transformers gives them, as factors of the peak rate.

Our own because importing transformers' takes seconds (it imports peft and bitsandbytes where they are installed); the
tests compare each with transformers'. With s steps done, w warm-up steps, n steps in all, and p = (s - w) / (n - w):
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from inlay.errors import ConfigError

Falling = Callable[..., float]


def linear(p: float) -> float:
    """1 - p"""
    return 1.0 - p


def cosine(p: float, *, num_cycles: float = 0.5) -> float:
    """(1 + cos 2π·cycles·p) / 2"""
    return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * p)))


def cosine_with_restarts(p: float, *, num_cycles: int = 1) -> float:
    """A half cosine that begins anew `num_cycles` times."""
    return 0.0 if p >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * p) % 1.0)))


def cosine_with_min_lr(p: float, *, min_lr_rate: float = 0.1, num_cycles: float = 0.5) -> float:
    """A cosine that ends at `min_lr_rate` of the peak."""
    return min_lr_rate + (1.0 - min_lr_rate) * cosine(p, num_cycles=num_cycles)


def polynomial(p: float, *, power: float = 1.0, end_rate: float = 0.0) -> float:
    """(1 - end)·(1 - p)^power + end, with `end_rate` a part of the peak."""
    return float((1.0 - end_rate) * (1.0 - p) ** power + end_rate)


def warmup_stable_decay(p: float, *, decay_ratio: float = 0.2, min_lr_ratio: float = 0.0) -> float:
    """1, then a half cosine to `min_lr_ratio` over the last `decay_ratio` of the steps after the warm-up."""
    done = max(0.0, (p - (1.0 - decay_ratio)) / decay_ratio)
    return min_lr_ratio + (1.0 - min_lr_ratio) * cosine(done)


def constant(p: float) -> float:
    """1"""
    del p
    return 1.0


FALLING: dict[str, Falling] = {
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
    "constant_with_warmup": constant,
    "polynomial": polynomial,
    "cosine_with_restarts": cosine_with_restarts,
    "cosine_with_min_lr": cosine_with_min_lr,
    "warmup_stable_decay": warmup_stable_decay,
}


def factor(step: int, *, name: str, warmup: int, total: int, settings: dict[str, Any]) -> float:
    """Learning rate over its peak, after `step` steps."""
    if step < warmup and name != "constant":
        return step / warmup
    if name == "inverse_sqrt":
        scale = float(settings.get("timescale") or warmup or 10_000)
        return 1.0 / math.sqrt((step + scale - warmup) / scale)
    return FALLING[name](min(1.0, (step - warmup) / max(1, total - warmup)), **settings)


def build_schedule(optimizer: Optimizer, name: str, warmup: int, total: int, settings: dict[str, Any]) -> LambdaLR:
    """The schedule over an optimizer; its rise takes `warmup` of `total` steps.

    Raises:
        ConfigError: settings that this schedule does not take.
    """
    taken = ["timescale"] if name == "inverse_sqrt" else list(inspect.signature(FALLING[name]).parameters)[1:]
    unknown = sorted(set(settings) - set(taken))
    if unknown:
        known = ", ".join(taken) or "none"
        raise ConfigError(f"lr_scheduler_kwargs: {name} does not take {', '.join(unknown)}; it takes: {known}")
    return LambdaLR(optimizer, partial(factor, name=name, warmup=warmup, total=total, settings=settings))
