"""Cross-entropy of a chunk of logits and its gradient in two passes over the chunk, in place, as a Triton kernel.

    loss_n = log Σ exp z_nv - (1 - ε) z_ny - ε / V Σ z_nv        dz_nv = w_n (softmax(z_n)_v - (1 - ε) [v = y] - ε / V)

The chunk holds logits before and their gradient after: no second tensor of the size of the vocabulary is needed.

Legend: N targets, V vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, attr-defined"
# Kernels are read by Triton, which gives parameter annotations a meaning of its own.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


@triton.jit
def _cross_entropy(
    logits, labels, weights, losses, firsts, V, row, ignored, smoothing, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    at = logits + n.to(tl.int64) * row
    label, weight, columns = tl.load(labels + n), tl.load(weights + n), tl.arange(0, BLOCK)
    highest, total, plain = float("-inf"), 0.0, 0.0
    first = 0
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        z = tl.load(at + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        here, place = tl.max(z, axis=0, return_indices=True)
        first = tl.where(here > highest, start + place, first)
        higher = tl.maximum(highest, here)
        # exp(-inf - -inf) is NaN where nothing but -inf was seen.
        kept = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - higher))
        total = total * kept + tl.sum(tl.where(inside & (z > float("-inf")), tl.exp(z - higher), 0.0), axis=0)
        plain += tl.sum(tl.where(inside, z, 0.0), axis=0)
        highest = higher
    counts = label != ignored
    lse = highest + tl.log(total)
    chosen = tl.load(at + label, mask=counts, other=0.0).to(tl.float32)
    loss = lse - (1 - smoothing) * chosen
    if smoothing > 0:
        loss -= smoothing / V * plain
    tl.store(losses + n, tl.where(counts, loss, 0.0))
    tl.store(firsts + n, first.to(tl.int64))
    tl.debug_barrier()  # every thread has read the label's logit before one overwrites it
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        z = tl.load(at + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        grad = tl.exp(z - lse) - tl.where(start + columns == label, 1 - smoothing, 0.0) - smoothing / V
        grad = tl.where(counts, weight * grad, 0.0)
        tl.store(at + start + columns, grad.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor, smoothing: float = 0.0, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """Losses and first choices of each row; `logits_NV` becomes the gradient of Σ_n w_n loss_n, in place.

    Args:
        logits_NV: rows contiguous; summed in fp32 whatever the dtype.
        labels_N: int64; rows with `ignored` have loss and gradient 0.
        weights_N: fp32, what the loss of each row is multiplied by in the gradient.

    Returns:
        The unweighted losses (N,), fp32, and the indices of the largest logits (N,), int64, the first among equals.
    """
    N, V = logits_NV.shape
    losses_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    firsts_N = torch.empty(N, dtype=torch.int64, device=logits_NV.device)
    block = min(triton.next_power_of_2(V), 8192)
    if N:
        with torch.cuda.device_of(logits_NV):
            _cross_entropy[(N,)](
                logits_NV, labels_N, weights_N, losses_N, firsts_N, V, logits_NV.stride(0), ignored, smoothing,
                BLOCK=block, num_warps=8 if block >= 2048 else 4,
            )  # fmt: skip
    return losses_N, firsts_N


def cross_entropy_plain_(
    logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor, smoothing: float = 0.0, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """The same in torch's own operations: the truth that the kernel is tested against."""
    z_NV = logits_NV.float()
    V, counts_N = z_NV.shape[1], labels_N != ignored
    losses_N = F.cross_entropy(z_NV, labels_N, reduction="none", ignore_index=ignored, label_smoothing=smoothing)
    grad_NV = torch.softmax(z_NV, dim=1).sub_(smoothing / V)
    grad_NV.scatter_add_(
        1, labels_N.where(counts_N, 0)[:, None], torch.full_like(z_NV[:, :1], smoothing - 1)
    )  # fmt: skip
    grad_NV.mul_((weights_N * counts_N)[:, None])
    firsts_N = z_NV.argmax(1)
    logits_NV.copy_(grad_NV)
    return losses_N, firsts_N
