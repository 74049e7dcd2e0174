"""Matrix products with a low-rank product in the accumulator, as Triton kernels.

    product        out = a w + bias + scale · keep ∘ (low up)
    add_low_rank_  out += scale · keep ∘ (low up)
    shrink         s = scale · (keep ∘ x) Aᵀ
    shrink_grad    dA = scale · dsᵀ (keep ∘ x)

`keep` is the mask of `philox`, computed again in each of them. The low-rank product starts the accumulator, so adding
it costs no pass over the output.

Legend: M rows, N / K columns of the result / of the sum, I features that x has, R rank.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are read by Triton, which gives parameter annotations a meaning of its own.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.kernels.philox import threshold_of
from inlay.kernels.triton_philox import keep_block


class Tile(NamedTuple):
    """How a product is cut: the rows and columns of one program, the part of the sum in one step."""

    M: int
    N: int
    K: int
    warps: int
    stages: int


TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4))
FP32_TILES = (Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 4, 3))
_GROUP = 8  # row blocks that neighbouring programs share, for the L2 cache


@triton.jit
def low_rank_block(
    low, up, rows, columns, M, N, R, low_row, up_rank, up_column, scale, RANK: tl.constexpr, HOW: tl.constexpr
):
    """scale · low[rows, :] up[:, columns]"""
    ranks = tl.arange(0, RANK)
    low_part = tl.load(
        low + rows[:, None].to(tl.int64) * low_row + ranks[None, :],
        mask=(rows[:, None] < M) & (ranks[None, :] < R),
        other=0.0,
    )
    up_part = tl.load(
        up + ranks[:, None] * up_rank + columns[None, :].to(tl.int64) * up_column,
        mask=(ranks[:, None] < R) & (columns[None, :] < N),
        other=0.0,
    )
    return tl.dot(low_part, up_part, input_precision=HOW) * scale


@triton.jit
def block_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column block of this program, in an order that reuses what the L2 cache holds."""
    program, down, across = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def _product(
    a, w, bias, low, up, out, seed,
    M, N, K, R,
    a_row, w_sum, w_column, low_row, up_rank, up_column, out_row,
    scale, threshold,
    RANK: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, HOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block_m, block_n = block_of(M, N, BM, BN, GROUP)
    rows, columns = block_m * BM + tl.arange(0, BM), block_n * BN + tl.arange(0, BN)
    sums = tl.arange(0, BK)
    if RANK > 0:
        total = low_rank_block(low, up, rows, columns, M, N, R, low_row, up_rank, up_column, scale, RANK, HOW)
        if MASKED:
            total = tl.where(keep_block(tl.load(seed), rows, block_n * BN, threshold, BN), total, 0.0)
    else:
        total = tl.zeros([BM, BN], tl.float32)
    # Rows and columns past the end read those at the start, so that the loop masks the sum alone.
    a_at = a + (rows % M)[:, None].to(tl.int64) * a_row + sums[None, :]
    w_at = w + sums[:, None].to(tl.int64) * w_sum + (columns % N)[None, :].to(tl.int64) * w_column
    for start in range(0, K, BK):
        left = K - start
        a_part = tl.load(a_at, mask=sums[None, :] < left, other=0.0)
        w_part = tl.load(w_at, mask=sums[:, None] < left, other=0.0)
        total = tl.dot(a_part, w_part, total, input_precision=HOW)
        a_at += BK
        w_at += BK * w_sum
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None].to(tl.int64) * out_row + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def _add_low_rank(
    out, low, up, seed, M, N, R, out_row, low_row, up_rank, up_column, scale, threshold,
    RANK: tl.constexpr, MASKED: tl.constexpr, HOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    added = low_rank_block(low, up, rows, columns, M, N, R, low_row, up_rank, up_column, scale, RANK, HOW)
    if MASKED:
        added = tl.where(keep_block(tl.load(seed), rows, tl.program_id(1) * BN, threshold, BN), added, 0.0)
    at = out + rows[:, None].to(tl.int64) * out_row + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + added).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _shrink(
    x, A, s, seed, M, I, R, x_row, A_row, scale, threshold,
    RANK: tl.constexpr, MASKED: tl.constexpr, HOW: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    rows, ranks, features = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RANK), tl.arange(0, BI)
    total = tl.zeros([BM, RANK], tl.float32)
    for start in range(0, I, BI):
        inside = start + features < I
        x_part = tl.load(
            x + rows[:, None].to(tl.int64) * x_row + start + features[None, :],
            mask=(rows[:, None] < M) & inside[None, :],
            other=0.0,
        )
        if MASKED:
            x_part = tl.where(keep_block(tl.load(seed), rows, start, threshold, BI), x_part, 0.0)
        A_part = tl.load(
            A + ranks[None, :] * A_row + start + features[:, None],
            mask=(ranks[None, :] < R) & inside[:, None],
            other=0.0,
        )
        total = tl.dot(x_part, A_part, total, input_precision=HOW)
    at = s + rows[:, None] * R + ranks[None, :]
    tl.store(at, (total * scale).to(s.dtype.element_ty), mask=(rows[:, None] < M) & (ranks[None, :] < R))


@triton.jit
def _shrink_grad(
    ds, x, dA, seed, M, I, R, ds_row, x_row, scale, threshold,
    RANK: tl.constexpr, MASKED: tl.constexpr, HOW: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    features, ranks = tl.program_id(0) * BI + tl.arange(0, BI), tl.arange(0, RANK)
    total = tl.zeros([RANK, BI], tl.float32)
    for start in range(0, M, BM):
        rows = start + tl.arange(0, BM)
        x_part = tl.load(
            x + rows[:, None].to(tl.int64) * x_row + features[None, :],
            mask=(rows[:, None] < M) & (features[None, :] < I),
            other=0.0,
        )
        if MASKED:
            x_part = tl.where(keep_block(tl.load(seed), rows, tl.program_id(0) * BI, threshold, BI), x_part, 0.0)
        ds_part = tl.load(
            ds + rows[None, :] * ds_row + ranks[:, None],
            mask=(rows[None, :] < M) & (ranks[:, None] < R),
            other=0.0,
        )
        total = tl.dot(ds_part, x_part, total, input_precision=HOW)
    at = dA + ranks[:, None] * I + features[None, :]
    tl.store(at, total * scale, mask=(ranks[:, None] < R) & (features[None, :] < I))


class Mask(NamedTuple):
    """A dropout mask: its seed, and the probability of an entry to go."""

    seed: Tensor
    p: float


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as torch's own products do at present. Others have one way."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def padded_rank(rank: int) -> int:
    """The rank that a kernel works with: a power of two, at least 16, which the tensor cores need."""
    return max(16, 1 << (rank - 1).bit_length())


def product(
    a_MK: Tensor,
    w_KN: Tensor,
    bias_N: Tensor | None,
    low_MR: Tensor | None,
    up_RN: Tensor | None,
    scale: float,
    mask: Mask | None = None,
    tile: Tile = TILES[1],
) -> Tensor:
    """a w + bias + scale · keep ∘ (low up), in the dtype of a, summed in fp32.

    Args:
        a_MK: rows contiguous, as `low_MR`.
        w_KN: any strides, so that a transposed view is read as it lies. `up_RN` likewise.
        low_MR, up_RN: None for no low-rank product.
        mask: which entries of low up stay; of shape (M, N). The factor 1 / (1 - p) belongs into `scale`.
    """
    (M, K), N = a_MK.shape, w_KN.shape[1]
    out_MN = a_MK.new_empty(M, N)
    low, up = (low_MR, up_RN) if low_MR is not None and up_RN is not None else (a_MK, w_KN)
    rank = 0 if low_MR is None else low.shape[1]
    grid = (triton.cdiv(M, tile.M) * triton.cdiv(N, tile.N),)
    with torch.cuda.device_of(a_MK):
        _product[grid](
            a_MK, w_KN, a_MK if bias_N is None else bias_N, low, up, out_MN, a_MK if mask is None else mask.seed,
            M, N, K, rank,
            a_MK.stride(0), w_KN.stride(0), w_KN.stride(1), low.stride(0), up.stride(0), up.stride(1), N,
            scale, 0 if mask is None else threshold_of(mask.p),
            RANK=padded_rank(rank) if rank else 0, BIAS=bias_N is not None, MASKED=mask is not None,
            HOW=precision(a_MK.dtype), BM=tile.M, BN=tile.N, BK=tile.K, GROUP=_GROUP,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out_MN


def add_low_rank_(
    out_MN: Tensor, low_MR: Tensor, up_RN: Tensor, scale: float, mask: Mask | None, rows: int = 64, columns: int = 64
) -> Tensor:
    """out += scale · keep ∘ (low up), in place: one pass for products that were made elsewhere.

    Args:
        out_MN, low_MR: rows contiguous; `up_RN` has any strides.
        rows, columns: what one program treats at once.
    """
    (M, N), R = out_MN.shape, low_MR.shape[1]
    with torch.cuda.device_of(out_MN):
        _add_low_rank[(triton.cdiv(M, rows), triton.cdiv(N, columns))](
            out_MN, low_MR, up_RN, out_MN if mask is None else mask.seed, M, N, R,
            out_MN.stride(0), low_MR.stride(0), up_RN.stride(0), up_RN.stride(1),
            scale, 0 if mask is None else threshold_of(mask.p),
            RANK=padded_rank(R), MASKED=mask is not None, HOW=precision(out_MN.dtype), BM=rows, BN=columns,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out_MN


def shrink(x_MI: Tensor, A_RI: Tensor, scale: float, mask: Mask | None, rows: int = 16, features: int = 128) -> Tensor:
    """scale · (keep ∘ x) Aᵀ of shape (M, R), in the dtype of x: nothing of the size of x is written.

    Args:
        x_MI, A_RI: rows contiguous.
        rows, features: what one program treats at once; few rows, since R is too small to share the work out otherwise.
    """
    (M, I), R = x_MI.shape, A_RI.shape[0]
    s_MR = x_MI.new_empty(M, R)
    with torch.cuda.device_of(x_MI):
        _shrink[(triton.cdiv(M, rows),)](
            x_MI, A_RI, s_MR, x_MI if mask is None else mask.seed, M, I, R, x_MI.stride(0), A_RI.stride(0),
            scale, 0 if mask is None else threshold_of(mask.p),
            RANK=padded_rank(R), MASKED=mask is not None, HOW=precision(x_MI.dtype), BM=rows, BI=features,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return s_MR


def shrink_grad(
    ds_MR: Tensor, x_MI: Tensor, scale: float, mask: Mask | None, rows: int = 64, features: int = 32
) -> Tensor:
    """scale · dsᵀ (keep ∘ x) of shape (R, I), fp32.

    Args:
        ds_MR, x_MI: rows contiguous, one dtype.
        rows, features: what one program treats at once.
    """
    (M, I), R = x_MI.shape, ds_MR.shape[1]
    dA_RI = x_MI.new_empty(R, I, dtype=torch.float32)
    with torch.cuda.device_of(x_MI):
        _shrink_grad[(triton.cdiv(I, features),)](
            ds_MR, x_MI, dA_RI, x_MI if mask is None else mask.seed, M, I, R, ds_MR.stride(0), x_MI.stride(0),
            scale, 0 if mask is None else threshold_of(mask.p),
            RANK=padded_rank(R), MASKED=mask is not None, HOW=precision(x_MI.dtype), BM=rows, BI=features,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return dA_RI
