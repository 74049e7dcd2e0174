"""Decoding blockwise 4-bit weights in Triton, alone and inside a matrix product.

The decoded values have the bits of the plain form (`inlay.quant.blockwise`): products and sums of fp32 are rounded one
by one (`enable_fp_fusion=False`), then once to the dtype of the result.

Legend: M rows, I / O features, R rank.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are read by Triton, which gives parameter annotations a meaning of its own.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.triton_products import Tile, low_rank_block, padded_rank, precision
from inlay.quant.base import QuantState
from inlay.quant.double_quant import dynamic_table
from inlay.quant.product import Packed

TILES = (Tile(16, 64, 64, 4, 4), Tile(16, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3))
_BYTES = 1024


@triton.jit
def scale_at(block, inside, absmax, nested, dynamic, offset, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    """The fp32 scale of each block of weights."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        coarse = tl.load(nested + block // NESTED_BLOCK, mask=inside, other=0.0)
        scale = tl.load(dynamic + code) * coarse + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _dequantize(
    packed, absmax, nested, dynamic, offset, book, out, count,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 2 * at < count
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    scale = scale_at(2 * at // BLOCK, inside, absmax, nested, dynamic, offset, NESTED, NESTED_BLOCK)
    first, second = tl.load(book + (byte >> 4)) * scale, tl.load(book + (byte & 15)) * scale
    values = tl.reshape(tl.join(first, second), (2 * BYTES,))
    to = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + to, values.to(out.dtype.element_ty), mask=to < count)


@triton.jit
def _product4(
    x, packed, absmax, nested, dynamic, offset, book, bias, s, B, out,
    M, O, I, R, x_row, s_row, B_row, scale,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, BIAS: tl.constexpr, HOW: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    rows, outs = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BO + tl.arange(0, BO)
    features, pairs = tl.arange(0, BI), tl.arange(0, BI // 2)
    if RANK > 0:
        total = low_rank_block(s, B, rows, outs, M, O, R, s_row, 1, B_row, scale, RANK, HOW)
    else:
        total = tl.zeros([BM, BO], tl.float32)
    first = outs.to(tl.int64) * I
    for start in range(0, I, BI):
        x_part = tl.load(
            x + rows[:, None].to(tl.int64) * x_row + start + features[None, :],
            mask=(rows[:, None] < M) & (start + features[None, :] < I),
            other=0.0,
        )
        inside = (outs[:, None] < O) & (start + 2 * pairs[None, :] < I)
        byte = tl.load(packed + (first[:, None] + start) // 2 + pairs[None, :], mask=inside, other=0).to(tl.int32)
        absolute = scale_at(
            (first + start) // BLOCK, outs < O, absmax, nested, dynamic, offset, NESTED, NESTED_BLOCK
        )[:, None]  # fmt: skip
        high, low = tl.load(book + (byte >> 4)) * absolute, tl.load(book + (byte & 15)) * absolute
        w_part = tl.reshape(tl.join(high, low), (BO, BI)).to(x.dtype.element_ty)
        total = tl.dot(x_part, tl.trans(w_part), total, input_precision=HOW)
    if BIAS:
        total += tl.load(bias + outs, mask=outs < O, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None].to(tl.int64) * O + outs[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows[:, None] < M) & (outs[None, :] < O))


class _Scales(NamedTuple):
    absmax: Tensor
    nested: Tensor
    dynamic: Tensor
    offset: Tensor
    book: Tensor

    @classmethod
    def of(cls, state: QuantState) -> tuple[_Scales, dict[str, Any]]:
        """What a kernel reads scales and values from, and the constants that go with it."""
        device, nested = state.absmax.device, state.nested
        book = state.book.table(device)
        if nested is None:
            scales = cls(state.absmax, state.absmax, book, book, book)
            return scales, {"NESTED": False, "NESTED_BLOCK": 1, "BLOCK": state.block_size}
        scales = cls(state.absmax, nested.absmax, dynamic_table(device), nested.offset, book)
        return scales, {"NESTED": True, "NESTED_BLOCK": nested.block_size, "BLOCK": state.block_size}


def dequantize(packed: Tensor, state: QuantState, out: Tensor) -> Tensor:
    """Write the dense weight into `out`; arguments are those of `inlay.kernels.blocks4.dequantize`."""
    packed = packed.detach().view(torch.uint8).view(-1)
    scales, constants = _Scales.of(state)
    count = out.numel()
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(count, 2 * _BYTES),)](
            packed, *scales, out, count, **constants, BYTES=_BYTES, num_warps=8, enable_fp_fusion=False
        )
    return out


def fits(packed: Packed) -> bool:
    """Whether `product4` takes this weight: each step of a row must lie within one block of weights."""
    step = max(tile.K for tile in TILES)
    return packed.block_size % step == 0 and packed.in_features % packed.block_size == 0


def product4(
    x_MI: Tensor,
    packed: Packed,
    bias_O: Tensor | None,
    s_MR: Tensor | None,
    B_OR: Tensor | None,
    scale: float,
    tile: Tile = TILES[0],
) -> Tensor:
    """x Wᵀ + b + scale · s Bᵀ with W decoded tile by tile: the dense weight is never in memory.

    For few rows, where reading the weight is what costs; `fits` says which weights it takes.

    Args:
        x_MI, s_MR, B_OR: rows contiguous, one dtype; s and B are None for no low-rank product.
    """
    (M, I), O = x_MI.shape, packed.out_features
    out_MO = x_MI.new_empty(M, O)
    low, up = (s_MR, B_OR) if s_MR is not None and B_OR is not None else (x_MI, x_MI)
    rank = 0 if s_MR is None else low.shape[1]
    scales, constants = _Scales.of(packed.state(x_MI.dtype))
    with torch.cuda.device_of(x_MI):
        _product4[(triton.cdiv(M, tile.M), triton.cdiv(O, tile.N))](
            x_MI, packed.data.detach().view(torch.uint8).view(-1), *scales,
            x_MI if bias_O is None else bias_O, low, up, out_MO,
            M, O, I, rank, x_MI.stride(0), low.stride(0), up.stride(0), scale,
            **constants, RANK=padded_rank(rank) if rank else 0, BIAS=bias_O is not None, HOW=precision(x_MI.dtype),
            BM=tile.M, BO=tile.N, BI=tile.K,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out_MO
