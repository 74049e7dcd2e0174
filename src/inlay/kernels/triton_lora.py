"""A frozen projection with LoRA in it as one autograd function on CUDA.

    s  = α drop(x) Aᵀ                y  = x Wᵀ + b + s Bᵀ
    ds = α dy B                      dx = dy W + drop'(ds A)
    dA = dsᵀ drop(x)                 dB = dyᵀ s

Kept for the backward pass are x, s and a seed. Dropout costs no memory: its mask is computed again from the seed in the
kernels that need it, dx's among them. W may be packed in 4 bits. The two large products have a form with the low-rank
product in the accumulator and one with the vendor's product followed by a pass that adds; which of them runs is
measured once for each shape class (`triton_select.fastest`).

Legend: M rows (all leading dimensions together), I / O features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import triton_blocks4, triton_products
from inlay.kernels.frozen import Saved, Storage, Transposed
from inlay.kernels.philox import draw_seed, keep_mask
from inlay.kernels.triton_products import FP32_TILES, TILES, Mask, Tile
from inlay.kernels.triton_select import decided, fastest, size_class
from inlay.quant.product import Packed

_FUSED_ROWS = 256  # above, decoding a 4-bit weight once and for all rows always won in the literature

Weight = Tensor | Packed
"""A frozen W_OI, dense or packed."""


def frozen_weight(storage: Storage, saved: Saved, layout: Any) -> Weight:
    """What `lora_linear` takes for a weight that `inlay.kernels.frozen` reads."""
    if storage.packed:
        return _packed(saved, layout)
    (weight,) = saved
    assert weight is not None
    return weight.t() if isinstance(storage, Transposed) else weight


def _packed(tensors: Saved, layout: Any) -> Packed:
    parts: tuple[Any, ...] = (*tensors, *layout)
    return Packed(*parts)


def fits(x: Tensor, weight: Weight) -> bool:
    """Whether `lora_linear` takes these: a half or fp32 input in the weight's dtype and autocast's, a frozen weight."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype:
        return False
    return isinstance(weight, Packed) or (weight.dtype == x.dtype and not weight.requires_grad)


def lora_linear(
    x: Tensor, weight: Weight, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """x Wᵀ + b + scale · drop(x) Aᵀ Bᵀ in the dtype of x; differentiable once in x, b, A and B.

    Args:
        x: (..., I) on a device that `triton_select.usable` accepts.
        weight: W_OI, or its packed form. `fits` says whether it can be taken.
        A_RI, B_OR: fp32 masters, or in the dtype of x.
        p: probability of dropping an entry of x on its way into A; 0 outside of training.
    """
    if isinstance(weight, Packed):
        y: Tensor = _apply(x, bias_O, A_RI, B_OR, scale, p, weight[4:], *weight[:4])
    else:
        y = _apply(x, bias_O, A_RI, B_OR, scale, p, None, weight)
    return y


def lora_linear_plain(
    x: Tensor, w_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scale: float, mask: Mask | None
) -> Tensor:
    """The same in torch's own operations: the truth that the kernels are tested against."""
    dropped = x
    if mask is not None:
        keep = keep_mask(mask.seed, x[..., 0].numel(), x.shape[-1], mask.p).view(x.shape)
        dropped = torch.where(keep, x, 0.0) / (1 - mask.p)
    return F.linear(x, w_OI, bias_O) + scale * F.linear(F.linear(dropped, A_RI.to(x.dtype)), B_OR.to(x.dtype))


class _LoRALinear(torch.autograd.Function):
    """Each launch costs some 10 µs of a step of small models, so there are five in each direction: s and ds come out of
    their products scaled, and the factors are cast once, for both passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scale: float,
        p: float,
        layout: Any,
        *stored: Tensor | None,
    ) -> Tensor:
        x_MI, dtype = _rows(x), x.dtype
        ctx.types = A_RI.dtype, B_OR.dtype, None if bias_O is None else bias_O.dtype
        A_RI, B_OR = _in(A_RI, dtype), _in(B_OR, dtype)
        mask = Mask(draw_seed(x.device), p) if p else None
        s_MR = _shrink(x_MI, A_RI, scale, mask)
        weight = stored[0] if layout is None else _packed(stored, layout)
        assert weight is not None
        y = forward_product(x, x_MI, weight, bias_O, s_MR, B_OR)
        ctx.save_for_backward(x_MI, A_RI, B_OR, s_MR, None if mask is None else mask.seed, *stored)
        ctx.scale, ctx.p, ctx.shape, ctx.layout = scale, p, x.shape, layout
        if y._is_view() or y.dim() != x.dim():
            # Models may go on in place, which autograd forbids on views made in a Function.
            y = _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # The check costs as much as a small product: only where a second derivative may be asked for.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x_MI, A_RI, B_OR, s_MR, seed, *stored = ctx.saved_tensors
    mask = None if seed is None else Mask(seed, ctx.p)
    dy_MO = _rows(dy)
    type_A, type_B, type_bias = ctx.types
    needs_x, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
    dx = db_O = dA_RI = dB_OR = None
    if needs_x or needs_A:
        # With beta = 0 nothing is read of s; it has the shape.
        ds_MR = torch.addmm(s_MR, dy_MO, B_OR, beta=0, alpha=ctx.scale)
    if needs_x:
        weight = stored[0] if ctx.layout is None else _packed(stored, ctx.layout)
        dx = input_grad(dy_MO, weight, ds_MR, A_RI, mask).view(ctx.shape)
    if needs_bias:
        db_O = dy_MO.sum(0, dtype=type_bias)
    if needs_A:
        dA_RI = _in(_shrink_grad(ds_MR, x_MI, mask), type_A)
    if needs_B:
        dB_OR = _in(_sum_of_products(dy_MO.mT, s_MR), type_B)
    return dx, db_O, dA_RI, dB_OR, None, None, None, *([None] * len(stored))


_backward_once = once_differentiable(_backward)

# What `_LoRALinear.apply` ends in, after it has looked for functorch's tensors: `lora.usable` has done that.
_apply: Any = super(torch.autograd.Function, _LoRALinear).apply
_unsafe_view: Any = torch.ops.aten._unsafe_view.default


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W_OI; a packed one is decoded into scratch memory: use it at once."""
    return weight.scratch(dtype) if isinstance(weight, Packed) else weight


def forward_product(
    x: Tensor, x_MI: Tensor, weight: Weight, bias_O: Tensor | None, s_MR: Tensor, B_OR: Tensor
) -> Tensor:
    """y = x Wᵀ + b + s Bᵀ in the form that is fastest for this shape: fresh, with the dimensions of x or two."""
    bias = None if bias_O is None else _in(bias_O, x_MI.dtype)

    def plain() -> Tensor:
        y = F.linear(x, dense(weight, x.dtype), bias)
        y.view(-1, y.shape[-1]).addmm_(s_MR, B_OR.t())
        return y

    def fused(tile: Tile) -> Tensor:
        w_IO = dense(weight, x_MI.dtype).mT
        return triton_products.product(x_MI, w_IO, bias, s_MR, B_OR.mT, 1.0, tile=tile)

    def packed_fused(tile: Tile) -> Tensor:
        assert isinstance(weight, Packed)
        return triton_blocks4.product4(x_MI, weight, bias, s_MR, B_OR, 1.0, tile)

    key = _key("forward", x_MI, B_OR, weight, None)
    if decided(key) == 0:
        return plain()
    candidates: list[Callable[[], Tensor]] = [plain, *(partial(fused, tile) for tile in _tiles(x_MI.dtype))]
    if isinstance(weight, Packed) and len(x_MI) <= _FUSED_ROWS and triton_blocks4.fits(weight):
        candidates += [partial(packed_fused, tile) for tile in triton_blocks4.TILES]
    return fastest(key, candidates)


def input_grad(dy_MO: Tensor, weight: Weight, ds_MR: Tensor, A_RI: Tensor, mask: Mask | None) -> Tensor:
    """dx = dy W + keep ∘ (ds A) / (1 - p) in the form that is fastest for this shape."""

    def plain() -> Tensor:
        dx_MI = dy_MO @ dense(weight, dy_MO.dtype)
        if mask is None:
            return dx_MI.addmm_(ds_MR, A_RI)
        return triton_products.add_low_rank_(dx_MI, ds_MR, A_RI, 1 / (1 - mask.p), mask)

    def fused(tile: Tile) -> Tensor:
        scale = 1.0 if mask is None else 1 / (1 - mask.p)
        return triton_products.product(dy_MO, dense(weight, dy_MO.dtype), None, ds_MR, A_RI, scale, mask, tile)

    key = _key("input", dy_MO, A_RI, weight, mask)
    if decided(key) == 0:
        return plain()
    candidates: list[Callable[[], Tensor]] = [plain, *(partial(fused, tile) for tile in _tiles(dy_MO.dtype))]
    return fastest(key, candidates)


def _key(what: str, rows: Tensor, factor: Tensor, weight: Weight, mask: Mask | None) -> tuple[Any, ...]:
    packed = isinstance(weight, Packed)
    return what, size_class(rows.shape[0]), rows.shape[1], factor.shape, rows.dtype, rows.device, packed, mask is None


def _tiles(dtype: torch.dtype) -> tuple[Tile, ...]:
    return FP32_TILES if dtype == torch.float32 else TILES


def _shrink(x_MI: Tensor, A_RI: Tensor, scale: float, mask: Mask | None) -> Tensor:
    if mask is not None:
        return triton_products.shrink(x_MI, A_RI, scale / (1 - mask.p), mask)
    return x_MI.new_empty(x_MI.shape[0], A_RI.shape[0]).addmm_(x_MI, A_RI.t(), beta=0, alpha=scale)


def _shrink_grad(ds_MR: Tensor, x_MI: Tensor, mask: Mask | None) -> Tensor:
    if mask is None:
        return _sum_of_products(ds_MR.mT, x_MI)
    return triton_products.shrink_grad(ds_MR, x_MI, 1 / (1 - mask.p), mask)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32: a gradient that is summed over a batch should not be rounded to bf16 on its way to the master."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _rows(x: Tensor) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
