"""Dropout whose mask is computed again in the backward pass instead of being kept.

The mask is a function of a seed and the position: a counter hashed twice. The C form (`dropout.c`) reads and writes
each value once; torch draws its mask at a fraction of that speed and keeps it. The seed comes from torch's generator,
so `torch.manual_seed`, resumed runs and gradient checkpointing give the same masks.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from inlay.kernels import compiled

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_THREADED_FROM = 1 << 17
_WORD = 0xFFFFFFFF


class Mask(NamedTuple):
    """Which values stay: those whose draw reaches the threshold, p of 2³² being below it."""

    low: int
    high: int
    p: float

    @property
    def threshold(self) -> int:
        """Draws below this are dropped."""
        return min(_WORD, round(self.p * 2**32))


def draw(p: float) -> Mask:
    """A new mask with dropping probability p, seeded by torch's generator of the CPU."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    return Mask(seed & _WORD, seed >> 32 & _WORD, p)


def supports(x: Tensor) -> bool:
    """Whether `apply` takes tensors like x: on the CPU, where a compiler is there, in fp32 or bf16."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and x.numel() < 2**32 and _library() is not None


def apply(x: Tensor, mask: Mask, out: Tensor | None = None) -> Tensor:
    """x / (1 - p) where the mask keeps it and 0 elsewhere; with `out`, added to that in place.

    Args:
        x: any shape, contiguous; position i of the mask is element i.
        out: as x.
    """
    library = _library()
    assert library is not None
    target = torch.empty_like(x) if out is None else out
    assert x.is_contiguous()
    assert target.is_contiguous()
    library.inlay_dropout(
        x.data_ptr(),
        target.data_ptr(),
        x.numel(),
        mask.low,
        mask.high,
        mask.threshold,
        1 / (1 - mask.p),
        _DTYPES[x.dtype],
        int(out is not None),
        torch.get_num_threads() if x.numel() >= _THREADED_FROM else 1,
    )
    return target


def keeps(mask: Mask, count: int) -> Tensor:
    """The first `count` values of the mask as bools: the plain form."""

    def mix(h: Tensor) -> Tensor:
        h = (h ^ (h >> 16)) * 0x7FEB352D & _WORD
        h = (h ^ (h >> 15)) * 0x846CA68B & _WORD
        return h ^ (h >> 16)

    position = torch.arange(count, dtype=torch.int64) & _WORD
    return mix(mix(position ^ mask.low) + mask.high & _WORD) >= mask.threshold


@cache
def _library() -> ctypes.CDLL | None:
    if not compiled.enabled():
        return None
    library = compiled.load("dropout.c")
    if library is None:
        return None
    pointer, word = ctypes.c_void_p, ctypes.c_uint32
    library.inlay_dropout.argtypes = [
        *(pointer, pointer, ctypes.c_int64, word, word, word, ctypes.c_float, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    ]
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """The compiler and its flags (`$CC`) are not ours: try once."""
    mask, x = Mask(0x9E3779B9, 0x85EBCA6B, 0.25), torch.linspace(-2, 2, 1021)
    out = torch.empty_like(x)
    library.inlay_dropout(
        x.data_ptr(), out.data_ptr(), 1021, mask.low, mask.high, mask.threshold, 1 / 0.75, _DTYPES[x.dtype], 0, 1
    )
    agrees = torch.allclose(out, x / 0.75 * keeps(mask, 1021))
    if not agrees:
        compiled.log.warning("the compiled form of dropout.c gives wrong values and is not used")
    return agrees
