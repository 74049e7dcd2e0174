"""A dropout mask as a function of a seed: which entries stay is computed again wherever it is needed, never stored.

The counter-based generator is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The
counter is (row, column // 4, 0, 0), and the four words it gives belong to four neighbouring columns. This is the plain
form; `triton_philox` computes the same bits inside a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
MASK_BITS = 31
"""A mask compares this many bits of each word: Triton has no unsigned constants above 2^31."""


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of `device`, int64 of shape (1,).

    It stays on the device: reading it would wait for the device, and a number would be baked into a CUDA graph.
    """
    return torch.randint(2**62, (1,), device=device)


def threshold_of(p: float) -> int:
    """An entry is dropped where the upper `MASK_BITS` bits of its word are below this."""
    return round(p * (1 << MASK_BITS))


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Which entries of a (rows, columns) matrix stay, as bool: each with probability 1 - p."""
    groups = -(-columns // 4)
    row = torch.arange(rows, device=seed.device)[:, None].expand(rows, groups)
    group = torch.arange(groups, device=seed.device)[None, :].expand(rows, groups)
    words = torch.stack(philox(int(seed), row, group), dim=-1).view(rows, 4 * groups)[:, :columns]
    return (words >> (32 - MASK_BITS)) >= threshold_of(p)


def philox(seed: int, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of the counters (c0, c1, 0, 0), as int64."""
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLY[0], c0)
        high_1, low_1 = _multiply(_MULTIPLY[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _RAISE[0] & _WORD, k1 + _RAISE[1] & _WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a 64-bit product, in halves that fit a signed int64."""
    below, above = a * (b & 0xFFFF), a * (b >> 16)
    return (above + (below >> 16)) >> 16, (below + ((above & 0xFFFF) << 16)) & _WORD
