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

# Weights in one piece. The working set of a piece, about 10 bytes a weight, has to stay in a 1 MiB L2 cache
# half full.
_PIECE = 1 << 16
_TINY = 1e-38


def quantize_blocks(x: Tensor, book: CodeBook, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantise a tensor in blocks along its row-major order.

    x' = clamp(x · fp32(1 / absmax), -1, 1); the index counts the midpoints of the code book below x'.

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

    piece = max(_PIECE // block_size, 1) * block_size
    if x.device.type != "cpu":
        piece = max(full, 1)  # an accelerator wants few large launches
    size = min(piece, full)
    values = torch.empty(size, dtype=torch.float32, device=x.device)
    ranks = torch.empty(size, dtype=torch.uint8, device=x.device)
    above = torch.empty(size, dtype=torch.bool, device=x.device)
    for start in range(0, full, piece):
        n = min(piece, full - start)
        scaled, scale = values[:n], absmax[start // block_size : (start + n) // block_size]
        scaled_BS = scaled.copy_(flat[start : start + n]).view(-1, block_size)
        torch.amax(scaled_BS.abs(), dim=1, out=scale)
        scaled_BS.mul_((1.0 / scale.clamp(min=_TINY))[:, None]).clamp_(-1, 1)
        _rank(scaled, book, ranks[:n], above[:n])
        _pack(ranks[:n], book, packed[start // 2 : (start + n) // 2])
    if full < count:
        tail = flat[full:].float()
        # The short last block is divided, not multiplied by the reciprocal, and its scale is never below
        # 1e-38.
        absmax[-1] = scale = tail.abs().max().clamp(min=_TINY)
        scaled = torch.nn.functional.pad((tail / scale).clamp_(-1, 1), (0, count % 2))
        ranks = torch.empty_like(scaled, dtype=torch.uint8)
        _rank(scaled, book, ranks, torch.empty_like(scaled, dtype=torch.bool))
        _pack(ranks, book, packed[full // 2 :])
    if not bool(torch.isfinite(absmax).all()):
        raise QuantizationError(
            "a weight with NaN or infinite values cannot be quantised; check the checkpoint"
        )
    return packed.unsqueeze(1), absmax


def _rank(scaled: Tensor, book: CodeBook, ranks: Tensor, above: Tensor) -> None:
    ranks.zero_()
    bits = above.view(torch.uint8)
    for midpoint in book.midpoints():
        torch.gt(scaled, midpoint, out=above)
        ranks.add_(bits)


def _pack(ranks: Tensor, book: CodeBook, out: Tensor) -> None:
    if not book.is_sorted:
        ranks = _order(book, ranks.device)[ranks.to(torch.int32)]
    torch.bitwise_or(ranks[0::2] << 4, ranks[1::2], out=out)


@cache
def _order(book: CodeBook, device: torch.device) -> Tensor:
    return torch.tensor(book.order, dtype=torch.uint8, device=device)


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
    piece = max(_PIECE // block_size, 1) * block_size if out.device.type == "cpu" else max(full, 1)
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
