"""Double quantisation: the fp32 block scales in 8 bits (arXiv:2305.14314, section 3).

    offset = mean(absmax),    absmax ≈ D[q] · absmax2(block of 256) + offset

D is the signed 8-bit dynamic map of arXiv:1511.04561: seven decades, each cut into twice as many steps as the
one below. The paper calls it FP8; it is not an IEEE float.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from inlay.quant.base import Nested

NESTED_BLOCK = 256
_BINS = 65536


def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic map, fp32, sorted: 127 negative, 0, 128 positive, the last 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def dynamic_table(device: torch.device) -> Tensor:
    """`dynamic_map` on a device. Shared between callers: do not write."""
    return dynamic_map().to(device)


@cache
def _bin_codes(device: torch.device) -> Tensor:
    """The code of each of 65,536 equal bins of [-1, 1].

    bitsandbytes on CPU looks codes up in these bins instead of comparing with midpoints; a few codes in a
    thousand differ from the nearest. Its bytes are the reference, so the bins are part of the format.
    """
    table = dynamic_map()
    midpoints = 0.5 * (table[:-1] + table[1:])
    bins = -1.0 + (2.0 * torch.arange(_BINS, dtype=torch.float32)) / (_BINS - 1)
    return torch.bucketize(bins, midpoints).to(torch.uint8).to(device)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Store block scales in 8 bits.

    Args:
        absmax: fp32, one scale for each block of weights.

    Returns:
        The codes (uint8, same length) and what is needed to read them.
    """
    # On the CPU, wherever the weights are: a GPU adds in another order, and its last bit would be in every file.
    offset = absmax.cpu().mean().to(absmax.device)
    centred = absmax - offset
    count = centred.numel()
    blocks = -(-count // NESTED_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCK - count)).view(blocks, NESTED_BLOCK)
    absmax2 = padded.abs().amax(1)
    scaled = (padded * (1.0 / absmax2)[:, None]).clamp_(-1, 1)
    # Where a block is all zero the reciprocal is infinite and the product NaN; its code is 0.
    bins = scaled.nan_to_num_(0.0).add_(1.0).mul_(0.5).mul_(_BINS - 1).add_(0.5).to(torch.int32)
    codes = _bin_codes(absmax.device)[bins]
    codes[absmax2 == 0] = 0
    return codes.view(-1)[:count].clone(), Nested(absmax2, offset, NESTED_BLOCK)


def dequantize_absmax(codes: Tensor, nested: Nested) -> Tensor:
    """The fp32 block scales that `quantize_absmax` stored, one for each code."""
    count = codes.numel()
    scales = dynamic_table(codes.device)[codes.to(torch.int32)]
    full = count - count % nested.block_size
    if full:
        scales[:full].view(-1, nested.block_size).mul_(nested.absmax[: full // nested.block_size, None])
    if full < count:
        scales[full:].mul_(nested.absmax[-1])
    return scales.add_(nested.offset)
