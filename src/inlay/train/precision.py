"""In which precision a run computes: measured at its start, because bf16 is fast on some CPUs and slow on others."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from inlay.config import RunConfig
from inlay.kernels.gemm import has_instructions

TOKENS, WIDTH, INNER = 512, 384, 1536  # one feed-forward of a small encoder on a small batch
GAIN = 0.9  # bf16 must take less than this part of the fp32 time: below that the loss of digits buys nothing


def resolve_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """The configuration with `bf16` decided."""
    if config.bf16 is not None or config.fp16:
        return config.model_copy(update={"bf16": bool(config.bf16)})
    return config.model_copy(update={"bf16": faster_in_bf16(device)})


TRAINS_THE_BASE = ("full", "diffpruning")
"""Methods that start from the base's own weights, which are then not rounded."""


def resolve_dtype(config: RunConfig, method: str, stored: torch.dtype | None, device: torch.device) -> RunConfig:
    """The configuration with `dtype` decided, as far as the model's configuration says how its weights are stored.

    Under bf16 autocast each matrix is rounded to bf16 in every forward pass; kept in bf16 it is rounded once, in half
    the memory (a step of MiniLM takes two thirds of the time on a CPU). A CPU computes too slowly in float16, and in
    bfloat16 if it has no instructions for it.
    """
    if config.dtype != "auto":
        return config
    rounds = config.bf16 and not any(part in TRAINS_THE_BASE for part in method.split("+"))
    if rounds:
        chosen = "bfloat16"
    elif device.type == "cpu" and (stored == torch.float16 or (stored and not has_instructions(stored))):
        chosen = "float32"
    else:
        chosen = str(stored).removeprefix("torch.") if stored is not None else "auto"
    return config.model_copy(update={"dtype": chosen})


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of forward passes: bf16, fp16 or that of the weights."""
    if config.bf16 or config.fp16:
        return torch.autocast(device.type, dtype=torch.bfloat16 if config.bf16 else torch.float16)
    return nullcontext()


def faster_in_bf16(device: torch.device) -> bool:
    """Whether a feed-forward, forward and backward, is faster under bf16 autocast on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not has_instructions(torch.bfloat16):
        return False
    return feed_forward_seconds(True) < GAIN * feed_forward_seconds(False)


def fastest_feed_forward() -> float:
    """Seconds of that feed-forward in the precision that a run on this machine would take."""
    if torch.cuda.is_available():
        return 0.0  # what a GPU takes for it is no measure of how long a run lasts
    return feed_forward_seconds(faster_in_bf16(torch.device("cpu")))


def feed_forward_seconds(bf16: bool) -> float:
    """Seconds of a small encoder's feed-forward on a small batch on the CPU, forward and backward, at best."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(INNER, WIDTH, generator=generator)
    down = torch.randn(WIDTH, INNER, generator=generator)
    x_TI = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            y_TI = F.linear(F.gelu(F.linear(x_TI, up)), down)
        y_TI.float().sum().backward()
        best = min(best, time.perf_counter() - start)
    return best
