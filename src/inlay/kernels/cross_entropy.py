"""Cross-entropy through a frozen output projection, without the logits of all tokens ever being there.

    z = h Wᵀ + b        loss = Σ w ((1 - ε)(lse z - z_y) + ε (lse z - mean z))
    dh = w (softmax z - (1 - ε) 1_y - ε/V) W

Some rows at a time: their logits are turned into their gradient in place, and that into dh at once, while they are in
the cache; on a GPU by the Triton kernel. The backward pass only scales dh. That is the arithmetic of the plain form, in
the memory of one piece.

Shapes: N tokens with a target, I features, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import gemm, triton_select
from inlay.kernels.lora import without_autocast

PIECE = (1 << 23) - (1 << 12)
"""Logits at a time: in fp32 just below the 32 MiB from which on the allocator asks the system for pages each time."""

FEWEST = 32
"""Rows at a time at the least: fewer would read the weight too often."""


class CrossEntropy(NamedTuple):
    """The weighted sum of the losses, differentiable; of each token its loss, and whether its target came first."""

    total: Tensor
    loss_N: Tensor
    right_N: Tensor


def linear_cross_entropy(
    h_NI: Tensor,
    weight_VI: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    smoothing: float = 0.0,
    weights_N: Tensor | None = None,
    piece: int = PIECE,
) -> CrossEntropy:
    """The cross-entropy of h Wᵀ + b against labels, W and b being frozen.

    Equal to `F.cross_entropy(F.linear(h, W, b).float(), labels, label_smoothing=smoothing)` of each token. Under
    autocast the products are in its dtype; the softmax is in fp32 always. Differentiable once, in h.

    Args:
        h_NI: what enters the projection.
        weight_VI, bias_V: the projection.
        labels_N: the class of each token, in [0, V).
        smoothing: ε.
        weights_N: of each token in `total`; 1 where absent.
        piece: logits that are there at a time.
    """
    device = h_NI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_NI.dtype
    with torch.no_grad():
        weight_VI = weight_VI.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    outputs = _LinearCrossEntropy.apply(h_NI.to(dtype), weight_VI, bias_V, labels_N, smoothing, weights_N, piece)  # type: ignore[no-untyped-call]
    return CrossEntropy(*outputs)


def _to_gradient(
    z_nV: Tensor, labels_n: Tensor, weights_N: Tensor | None, rows: slice, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Losses and first choices; the logits become their gradient in place, in two passes instead of seven."""
    from inlay.kernels.triton_cross_entropy import cross_entropy_

    weights_n = torch.ones(len(z_nV), device=z_nV.device) if weights_N is None else weights_N[rows].float()
    return cross_entropy_(z_nV, labels_n, weights_n, smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NI: Tensor,
        weight_VI: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        smoothing: float,
        weights_N: Tensor | None,
        piece: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, vocabulary = len(h_NI), len(weight_VI)
        wide = torch.promote_types(h_NI.dtype, torch.float32)
        loss_N = torch.empty(count, dtype=wide, device=h_NI.device)
        right_N = torch.empty(count, dtype=torch.bool, device=h_NI.device)
        dh_NI = torch.empty_like(h_NI) if ctx.needs_input_grad[0] else None
        size = max(FEWEST, piece // vocabulary)
        in_triton = h_NI.dtype != torch.float64 and triton_select.usable(h_NI, weight_VI, labels_N)
        with without_autocast(h_NI.device.type):
            for at in range(0, count, size):
                rows = slice(at, at + size)
                z_nV = gemm.linear(h_NI[rows], weight_VI, bias_V)
                if in_triton:
                    loss_N[rows], first_n = _to_gradient(z_nV, labels_N[rows], weights_N, rows, smoothing)
                    right_N[rows] = first_n == labels_N[rows]
                    if dh_NI is not None:
                        dh_NI[rows] = gemm.input_grad(z_nV, weight_VI)
                    continue
                z_nV, labels_n1 = z_nV.to(wide), labels_N[rows, None]
                right_N[rows] = z_nV.argmax(-1) == labels_n1[:, 0]
                lse_n1 = z_nV.logsumexp(-1, keepdim=True)
                wanted_n1 = z_nV.gather(-1, labels_n1)
                loss_n1 = lse_n1 - (1 - smoothing) * wanted_n1
                if smoothing:
                    loss_n1 -= smoothing * z_nV.mean(-1, keepdim=True)
                loss_N[rows] = loss_n1[:, 0]
                if dh_NI is None:
                    continue
                dz_nV = z_nV.sub_(lse_n1).exp_()
                if smoothing:
                    dz_nV.sub_(smoothing / vocabulary)
                dz_nV.scatter_add_(-1, labels_n1, torch.full_like(wanted_n1, smoothing - 1))
                if weights_N is not None:
                    dz_nV.mul_(weights_N[rows, None])
                dh_NI[rows] = gemm.input_grad(dz_nV.to(h_NI.dtype), weight_VI)
                del z_nV, dz_nV  # else they stay while the next piece is made
        ctx.save_for_backward(dh_NI)
        ctx.mark_non_differentiable(loss_N, right_N)
        total = loss_N.sum() if weights_N is None else (loss_N * weights_N).sum()
        return total, loss_N, right_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (dh_NI,) = ctx.saved_tensors
        return dh_NI * dtotal.to(dh_NI.dtype), None, None, None, None, None, None
