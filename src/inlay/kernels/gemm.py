"""Dense matrix products of training, through whichever library multiplies faster on this machine.

On AMD processors torch hands fp32 products to MKL, which reaches half the rate of oneDNN there; the same numbers come
out to the last digits. Which of the two is used is decided once per process and size class, by timing both on a small
product: the difference is a factor of two or none, so the decision does not change from run to run.

A processor without instructions for bf16 or fp16 (most with AVX2 alone) multiplies them far more slowly than fp32: a
frozen Llama's forward pass took 6 times as long, its backward pass 70 times (`benchmarks/run.py`, Zen 3). `emulated`
says so; products are then computed in fp32 and rounded, as their sums are fp32 either way. All other dtypes and devices
have one library.

Shapes: M rows, I features entering, O features leaving.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import compiled

GAIN = 1.4
"""oneDNN must be this much faster: between what is measured where both are alike and where they differ (2.2)."""

SMALL = 32
"""Rows below which a product waits for the weight and not for arithmetic: a size class of its own."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b of shape (..., O) for x of shape (..., I); not differentiable."""
    if emulated(x):
        return linear(x.float(), weight_OI.float(), None if bias_O is None else bias_O.float()).to(x.dtype)
    if _through_onednn(x, weight_OI):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight_OI, bias_O, "none", [], "")
        return y
    return F.linear(x, weight_OI, bias_O)


def input_grad(dy_MO: Tensor, weight_OI: Tensor) -> Tensor:
    """dx_MI = dy W; not differentiable."""
    if emulated(dy_MO):
        return input_grad(dy_MO.float(), weight_OI.float()).to(dy_MO.dtype)
    if _through_onednn(dy_MO, weight_OI):
        dx_MI: Tensor = torch.ops.mkldnn._linear_pointwise(dy_MO.contiguous(), weight_OI.t(), None, "none", [], "")
        return dx_MI
    return dy_MO.mm(weight_OI)


FEW = 4
"""Rows below which converting a weight costs more than multiplying by it in its own dtype."""


def emulated(x: Tensor) -> bool:
    """Whether products of x with a weight in its dtype are better computed in fp32, because the processor lacks it."""
    return (
        x.dtype in _HALVES
        and x.is_cpu
        and x.numel() >= FEW * x.shape[-1]
        and not has_instructions(x.dtype)
        and compiled.enabled()
    )


_HALVES = (torch.bfloat16, torch.float16)


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies that dtype, as oneDNN says; True where it cannot be asked."""
    if dtype not in _HALVES:
        return True
    name = "_is_mkldnn_bf16_supported" if dtype is torch.bfloat16 else "_is_mkldnn_fp16_supported"
    asked = getattr(torch.ops.mkldnn, name, None)
    return asked is None or bool(asked())


def _through_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.dtype is not torch.float32 or not x.is_cpu or x.dim() < 2 or not x.numel() or not weight.numel():
        return False
    return onednn_is_faster(x.numel() < SMALL * x.shape[-1])


@cache
def onednn_is_faster(small: bool) -> bool:
    """Whether fp32 products go to oneDNN by its private operator: it is there, agrees, and is faster by `GAIN`."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or not torch.backends.mkldnn.is_available() or not compiled.enabled():
        return False
    generator = torch.Generator().manual_seed(0)
    x_MI = torch.randn(8 if small else 192, 1024, generator=generator)
    weight_OI = torch.randn(1024, 1024, generator=generator)
    try:
        with torch.no_grad():
            plain, other = F.linear(x_MI, weight_OI), operator(x_MI, weight_OI, None, "none", [], "")
            if not torch.allclose(plain, other, rtol=1e-5, atol=1e-4):
                return False
            mkl, onednn = _seconds(
                lambda: F.linear(x_MI, weight_OI), lambda: operator(x_MI, weight_OI, None, "none", [], "")
            )
    except (RuntimeError, TypeError) as error:  # a private operator may change or go
        compiled.log.info("no fp32 products through oneDNN: %s", error)
        return False
    compiled.log.info("fp32 products: MKL %.2f ms, oneDNN %.2f ms", mkl * 1e3, onednn * 1e3)
    return mkl > GAIN * onednn


def _seconds(*calls: Callable[[], Any], rounds: int = 5) -> list[float]:
    """The shortest time of each, called in turn so that a disturbance meets all."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
