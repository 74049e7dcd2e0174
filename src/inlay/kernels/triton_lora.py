"""A frozen projection with LoRA in it as one autograd function on CUDA.

    s  = drop(x) Aᵀ                  y  = x Wᵀ + b + α s Bᵀ
    ds = α dy B                      dx = dy W + drop'(ds A)
    dA = dsᵀ drop(x)                 dB = α dyᵀ s

Kept for the backward pass are x, s and a seed. Dropout costs no memory: its mask is computed again from the seed in the
kernels that need it, dx's among them. W may be packed in 4 bits. The two large products have a form with the low-rank
product in the accumulator and one with the vendor's product followed by a pass that adds; which of them runs is
measured once for each shape class (`triton_select.fastest`).

Legend: M rows (all leading dimensions together), I / O features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import triton_blocks4, triton_products
from inlay.kernels.frozen import Saved, Storage, Transposed
from inlay.kernels.philox import draw_seed, keep_mask
from inlay.kernels.triton_products import FP32_TILES, TILES, Mask, Tile
from inlay.kernels.triton_select import fastest, size_class
from inlay.quant.product import Packed

_FUSED_ROWS = 256  # above, decoding a 4-bit weight once and for all rows always won in the literature


class Weight(NamedTuple):
    """A frozen weight, dense or packed: exactly one of the two."""

    dense_OI: Tensor | None
    packed: Packed | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W_OI; a packed one is decoded into scratch memory: use it at once."""
        if self.packed is not None:
            return self.packed.scratch(dtype)
        assert self.dense_OI is not None
        return self.dense_OI

    def parts(self) -> tuple[Any, ...]:
        """The same as arguments of an autograd function."""
        return (self.dense_OI,) if self.packed is None else tuple(self.packed)

    @classmethod
    def of(cls, parts: tuple[Any, ...]) -> Weight:
        """What `parts` came from."""
        return cls(parts[0], None) if len(parts) == 1 else cls(None, Packed(*parts))


def frozen_weight(storage: Storage, saved: Saved, layout: Any) -> Tensor | Packed:
    """What `lora_linear` takes for a weight that `inlay.kernels.frozen` reads."""
    if storage.packed:
        parts: tuple[Any, ...] = (*saved, *layout)
        return Packed(*parts)
    (weight,) = saved
    assert weight is not None
    return weight.t() if isinstance(storage, Transposed) else weight


def fits(x: Tensor, weight: Tensor | Packed) -> bool:
    """Whether `lora_linear` takes these: a half or fp32 input in the weight's dtype, a frozen weight, no autocast."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not known or torch.is_autocast_enabled(x.device.type):
        return False
    return isinstance(weight, Packed) or (weight.dtype == x.dtype and not weight.requires_grad)


def lora_linear(
    x: Tensor, weight: Tensor | Packed, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """x Wᵀ + b + scale · drop(x) Aᵀ Bᵀ in the dtype of x; differentiable once in x, b, A and B.

    Args:
        x: (..., I) on a device that `triton_select.usable` accepts.
        weight: W_OI, or its packed form. `fits` says whether it can be taken.
        A_RI, B_OR: fp32 masters, or in the dtype of x.
        p: probability of dropping an entry of x on its way into A; 0 outside of training.
    """
    whole = Weight(None, weight) if isinstance(weight, Packed) else Weight(weight, None)
    y: Tensor = _LoRALinear.apply(x, bias_O, A_RI, B_OR, scale, p, *whole.parts())  # type: ignore[no-untyped-call]
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
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scale: float,
        p: float,
        *weight: Any,
    ) -> Tensor:
        x_MI = _rows(x)
        mask = Mask(draw_seed(x.device), p) if p else None
        s_MR = _shrink(x_MI, A_RI.to(x.dtype), mask)
        y_MO = forward_product(x_MI, Weight.of(weight), bias_O, s_MR, B_OR.to(x.dtype), scale)
        tensors = [t for t in weight if isinstance(t, Tensor)]
        ctx.save_for_backward(x_MI, A_RI, B_OR, s_MR, None if mask is None else mask.seed, *tensors)
        ctx.constants = [None if isinstance(t, Tensor) else t for t in weight]
        ctx.is_tensor = [isinstance(t, Tensor) for t in weight]
        ctx.scale, ctx.p, ctx.shape = scale, p, x.shape
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        # No view: models may go on in place, which autograd forbids on views made in a Function.
        y: Tensor = torch.ops.aten._unsafe_view(y_MO, [*x.shape[:-1], y_MO.shape[-1]])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, A_RI, B_OR, s_MR, seed, *tensors = ctx.saved_tensors
        left = iter(tensors)
        parts = [next(left) if given else c for given, c in zip(ctx.is_tensor, ctx.constants, strict=True)]
        mask = None if seed is None else Mask(seed, ctx.p)
        dy_MO = _rows(dy)
        needs_x, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx = db_O = dA_RI = dB_OR = None
        if needs_x or needs_A:
            ds_MR = dy_MO @ (ctx.scale * B_OR).to(dy.dtype)
        if needs_x:
            dx_MI = input_grad(dy_MO, Weight.of(tuple(parts)), ds_MR, A_RI.to(dy.dtype), mask)
            dx = dx_MI.view(ctx.shape)
        if needs_bias:
            db_O = dy_MO.sum(0, dtype=ctx.bias_dtype)
        if needs_A:
            dA_RI = _shrink_grad(ds_MR, x_MI, mask).to(A_RI.dtype)
        if needs_B:
            dB_OR = (ctx.scale * _sum_of_products(dy_MO.mT, s_MR)).to(B_OR.dtype)
        return dx, db_O, dA_RI, dB_OR, None, None, *([None] * len(parts))


def forward_product(
    x_MI: Tensor, weight: Weight, bias_O: Tensor | None, s_MR: Tensor, B_OR: Tensor, scale: float
) -> Tensor:
    """y = x Wᵀ + b + scale · s Bᵀ in the form that is fastest for this shape."""
    bias = None if bias_O is None else bias_O.to(x_MI.dtype)

    def plain() -> Tensor:
        y_MO = F.linear(x_MI, weight.dense(x_MI.dtype), bias)
        return y_MO.addmm_(s_MR, B_OR.mT, alpha=scale)

    def fused(tile: Tile) -> Tensor:
        w_IO = weight.dense(x_MI.dtype).mT
        return triton_products.product(x_MI, w_IO, bias, s_MR, B_OR.mT, scale, tile=tile)

    def packed_fused(tile: Tile) -> Tensor:
        assert weight.packed is not None
        return triton_blocks4.product4(x_MI, weight.packed, bias, s_MR, B_OR, scale, tile)

    candidates: list[Callable[[], Tensor]] = [plain, *(partial(fused, tile) for tile in _tiles(x_MI.dtype))]
    if weight.packed is not None and len(x_MI) <= _FUSED_ROWS and triton_blocks4.fits(weight.packed):
        candidates += [partial(packed_fused, tile) for tile in triton_blocks4.TILES]
    return fastest(_key("forward", x_MI, B_OR, weight), candidates)


def input_grad(dy_MO: Tensor, weight: Weight, ds_MR: Tensor, A_RI: Tensor, mask: Mask | None) -> Tensor:
    """dx = dy W + keep ∘ (ds A) / (1 - p) in the form that is fastest for this shape."""
    scale = 1.0 if mask is None else 1 / (1 - mask.p)

    def plain() -> Tensor:
        dx_MI = dy_MO @ weight.dense(dy_MO.dtype)
        return dx_MI.addmm_(ds_MR, A_RI) if mask is None else add(dx_MI)

    def add(dx_MI: Tensor) -> Tensor:
        return triton_products.add_low_rank_(dx_MI, ds_MR, A_RI, scale, mask)

    def fused(tile: Tile) -> Tensor:
        return triton_products.product(dy_MO, weight.dense(dy_MO.dtype), None, ds_MR, A_RI, scale, mask, tile)

    candidates: list[Callable[[], Tensor]] = [plain, *(partial(fused, tile) for tile in _tiles(dy_MO.dtype))]
    return fastest((*_key("input", dy_MO, A_RI, weight), mask is not None), candidates)


def _key(what: str, rows: Tensor, factor: Tensor, weight: Weight) -> tuple[Any, ...]:
    packed = weight.packed is not None
    return what, size_class(len(rows)), rows.shape[1], tuple(factor.shape), rows.dtype, rows.device, packed


def _tiles(dtype: torch.dtype) -> tuple[Tile, ...]:
    return FP32_TILES if dtype == torch.float32 else TILES


def _shrink(x_MI: Tensor, A_RI: Tensor, mask: Mask | None) -> Tensor:
    return F.linear(x_MI, A_RI) if mask is None else triton_products.shrink(x_MI, A_RI, 1 / (1 - mask.p), mask)


def _shrink_grad(ds_MR: Tensor, x_MI: Tensor, mask: Mask | None) -> Tensor:
    if mask is None:
        return _sum_of_products(ds_MR.mT, x_MI)
    return triton_products.shrink_grad(ds_MR, x_MI, 1 / (1 - mask.p), mask)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32: a gradient that is summed over a batch should not be rounded to bf16 on its way to the master."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
