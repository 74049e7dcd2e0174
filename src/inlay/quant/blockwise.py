"""The plain form of blockwise 4-bit quantisation, in torch and in pieces that stay in the cache.

This is the truth that `inlay.kernels` is tested against, and what runs where no kernel does.

Packing: byte k = index[2k] << 4 | index[2k + 1]; an odd tail is filled with the index of zero.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from inlay.errors import QuantizationError
from inlay.quant.base import CodeBook

# Weights treated at once. On CPU three fp32 buffers of this length stay in a 1 MiB L2 cache; an accelerator wants few
# launches, with buffers that are small beside its memory.
_PIECE_CPU, _PIECE_ACCELERATOR = 1 << 16, 1 << 24
_TINY = 1e-38
NOT_FINITE = "a weight with NaN or infinite values cannot be quantised; check the checkpoint"


def quantize_blocks(x: Tensor, book: CodeBook, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantise a tensor in blocks along its row-major order.

    x' = x · fp32(1 / absmax); the index counts the midpoints of the code book below x'.

    Args:
        x: any shape, fp32, bf16 or fp16.
        block_size: values that share one scale; the last block may be shorter.

    Returns:
        The packed bytes, uint8 of shape ((n + 1) // 2, 1), and the scales, fp32 of shape (ceil(n /
        block_size),).

    Raises:
        QuantizationError: another dtype, or values that are not finite.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise QuantizationError(
            f"only fp32, bf16 and fp16 weights can be quantised, this one is {x.dtype}; convert it first"
        )
    flat = x.detach().reshape(-1)
    count = flat.numel()
    full = count - count % block_size
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)

    piece = _piece(block_size, x.device)
    size = min(piece, full)
    scaled = torch.empty(size, dtype=torch.float32, device=x.device)
    ranks, above = torch.empty_like(scaled), torch.empty_like(scaled)
    for start in range(0, full, piece):
        n = min(piece, full - start)
        scaled_BS = scaled[:n].copy_(flat[start : start + n]).view(-1, block_size)
        scale = absmax[start // block_size : (start + n) // block_size]
        torch.amax(torch.abs(scaled_BS, out=above[:n].view(-1, block_size)), dim=1, out=scale)
        scaled_BS.mul_((1.0 / scale.clamp(min=_TINY))[:, None])
        _encode(scaled[:n], book, ranks[:n], above[:n], packed[start // 2 : (start + n) // 2])
    if full < count:
        tail = flat[full:].float()
        # The short last block is divided, not multiplied by the reciprocal, and its scale is never below 1e-38.
        absmax[-1] = scale = tail.abs().max().clamp(min=_TINY)
        tail = torch.nn.functional.pad(tail / scale, (0, count % 2))
        _encode(tail, book, torch.empty_like(tail), torch.empty_like(tail), packed[full // 2 :])
    if not bool(torch.isfinite(absmax).all()):
        raise QuantizationError(NOT_FINITE)
    return packed.unsqueeze(1), absmax


def _piece(block_size: int, device: torch.device) -> int:
    piece = _PIECE_CPU if device.type == "cpu" else _PIECE_ACCELERATOR
    return piece // block_size * block_size


def _encode(scaled: Tensor, book: CodeBook, ranks: Tensor, above: Tensor, out: Tensor) -> None:
    """Pack the ranks of scaled values. Counting in fp32 is exact, and torch compares into fp32 four times as
    fast as into bool."""
    ranks.zero_()
    for midpoint in book.midpoints():
        ranks.add_(torch.gt(scaled, midpoint, out=above))
    out.copy_(torch.add(ranks[1::2], ranks[0::2], alpha=16))
    if not book.is_sorted:
        out.copy_(_byte_order(book, out.device)[out.to(torch.int32)])


@cache
def _byte_order(book: CodeBook, device: torch.device) -> Tensor:
    """For each byte of two ranks the byte of the two indices."""
    order = torch.tensor(book.order, dtype=torch.uint8, device=device)
    return (order[:, None] << 4 | order[None, :]).view(-1)


@cache
def _pair_table(book: CodeBook, device: torch.device) -> Tensor:
    """For each byte the two values it decodes to, as one int64 that holds two fp32."""
    values = book.table(device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], dim=1).view(torch.int64).view(-1)


def dequantize_blocks(packed: Tensor, absmax: Tensor, book: CodeBook, block_size: int, out: Tensor) -> Tensor:
    """Undo `quantize_blocks`: the fp32 product book[index] · absmax, rounded once to the dtype of `out`.

    Args:
        packed: the bytes, uint8, any shape.
        absmax: fp32, one scale for each block.
        out: contiguous, one element for each weight; written and returned.
    """
    count = out.numel()
    full = count - count % block_size
    bytes_ = packed.reshape(-1)
    flat = out.view(-1)
    pairs = _pair_table(book, out.device)
    piece = _piece(block_size, out.device)
    size = min(piece, full)
    index = torch.empty(size // 2, dtype=torch.int32, device=out.device)
    rounds = out.dtype != torch.float32
    values = torch.empty(size if rounds else 0, dtype=torch.float32, device=out.device)
    for start in range(0, full, piece):
        n = min(piece, full - start)
        decoded = values[:n] if rounds else flat[start : start + n]
        torch.index_select(
            pairs,
            0,
            index[: n // 2].copy_(bytes_[start // 2 : (start + n) // 2]),
            out=decoded.view(torch.int64),
        )
        scale = absmax[start // block_size : (start + n) // block_size, None]
        decoded.view(-1, block_size).mul_(scale)
        if rounds:
            flat[start : start + n].copy_(decoded)
    if full < count:
        tail = pairs[bytes_[full // 2 :].to(torch.int32)].view(torch.float32)[: count - full]
        flat[full:].copy_(tail * absmax[-1])
    return out
