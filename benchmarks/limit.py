"""The time below which no training step of an adapter on a frozen Llama can come on this machine.

Every product of the step at the best rate that any product of its shape reached here, torch's own or oneDNN's, with the
weight as it lies or laid out in advance:

    frozen projections    2 M N K forward, 2 M N K for the gradient of their input; the first projections need none
    rank-r factors        6 M r (K + N)
    attention             4 M T d forward and twice that backward, half of it causal
    frozen head           2 M V d forward and again backward

Nothing else is counted: no norms, activations, softmax, optimizer, Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from variants import Size


@dataclass(frozen=True)
class Limit:
    """Milliseconds of the frozen part and of the factors, and the rate of the largest projections."""

    frozen: float
    factors: float
    gflops: float


def limit(size: Size, dtype: torch.dtype, rank: int) -> dict[str, float]:
    """The limit of a step at this size, as a `Limit` in plain values."""
    M, d, f = size.tokens, size.hidden, size.ffn
    kv = d // size.heads * size.kv_heads
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    frozen = 2 * milliseconds(M, d, size.vocab, dtype)
    for layer in range(size.layers):
        for i, (K, N) in enumerate(shapes):
            frozen += (1 if layer == 0 and i < 3 else 2) * milliseconds(M, K, N, dtype)
    rate = 2 * M * d * f / milliseconds(M, d, f, dtype)
    frozen += size.layers * 12 * M * size.length * d / 2 / rate
    factors = size.layers * sum(6 * M * rank * (K + N) for K, N in shapes) / rate
    return asdict(Limit(frozen, factors, rate / 1e6))


@cache
def milliseconds(M: int, K: int, N: int, dtype: torch.dtype) -> float:
    """The best time of an (M, K) × (K, N) product."""
    x, w = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    turned = w.t().contiguous()
    calls: list[Callable[[], object]] = [lambda: F.linear(x, w), lambda: x @ turned]
    onednn: Any = torch.ops.mkldnn
    try:
        laid_out = onednn._reorder_linear_weight(w.to_mkldnn(), M)
        calls += [
            lambda: onednn._linear_pointwise(x, w, None, "none", [], ""),
            lambda: onednn._linear_pointwise(x, laid_out, None, "none", [], ""),
        ]
        calls[-1]()
    except (RuntimeError, AttributeError, NotImplementedError):  # private operators of another torch
        calls = calls[:2]
    return min(_best(call) for call in calls)


def _best(call: Callable[[], object], seconds: float = 0.1) -> float:
    """Milliseconds of the fastest of as many calls as fit, at least three."""
    call()
    best, end, done = float("inf"), time.perf_counter() + seconds, 0
    while done < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, done = min(best, time.perf_counter() - start), done + 1
    return best * 1e3
