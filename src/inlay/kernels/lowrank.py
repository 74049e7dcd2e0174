"""The skinny products of one low-rank piece in bf16 on the CPU, each direction in one call (`lowrank.c`).

    s = x Aᵀ        y += scale s Bᵀ
    ds = scale dy B        dB = scale dyᵀ s        dA = dsᵀ x        dx += ds A

oneDNN needs 16 µs before it multiplies anything and passes over y, dy and x for each of these products; here a block
of rows is used for all of them while it is in the cache, with AMX or AVX512-BF16. The factors are read as the fp32
masters that they are, rounded to bf16 on the way, and their gradients come out in fp32 as summed. Denormal values count
as zero.

Shapes: M rows, I / O features entering / leaving, R rank.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inlay.kernels import compiled

MOST = 128
"""The rank from which on the vendor's product is as good: the blocks are read once for every 16 of it."""

_THREADED_FROM = 1 << 17
_pointer, _long = ctypes.c_void_p, ctypes.c_int64
_FORWARD: list[Any] = [_pointer, _long, *[_pointer] * 4, *[_long] * 5, ctypes.c_float, ctypes.c_int, ctypes.c_int]
_BACKWARD: list[Any] = [
    *[_pointer, _long] * 2, *[_pointer] * 6, _long, ctypes.c_int, *[_long] * 4, ctypes.c_float, *[ctypes.c_int] * 2
]  # fmt: skip

_CROSS: list[Any] = [_pointer, _long, *[_pointer] * 3, *[_long] * 3, ctypes.c_int, ctypes.c_int]


def fits(rows: Tensor, A_RI: Tensor, B_OR: Tensor) -> bool:
    """Whether the kernel takes rows like these (x, y and dy are alike in that) with these factors."""
    return (
        rows.dtype is torch.bfloat16
        and rows.is_cpu
        and A_RI.dtype is torch.float32
        and B_OR.dtype is torch.float32
        and A_RI.shape[0] <= MOST
        and A_RI.is_contiguous()
        and B_OR.is_contiguous()
        and _library() is not None
    )


def add_low_rank(x_MI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, y_MO: Tensor) -> Tensor:
    """s = x Aᵀ, after y += scale s Bᵀ in place. The features of y are neighbours in memory."""
    if x_MI.stride(-1) != 1:
        x_MI = x_MI.contiguous()
    (M, I), (O, R) = x_MI.shape, B_OR.shape
    s_MR = torch.empty((M, R), dtype=torch.bfloat16)
    library = _library()
    assert library is not None
    library.inlay_lowrank_forward(
        *(x_MI.data_ptr(), x_MI.stride(0), A_RI.data_ptr(), B_OR.data_ptr(), s_MR.data_ptr()),
        *(y_MO.data_ptr(), y_MO.stride(0), M, I, O, R, scale, library.level, _workers(M * max(I, O))),
    )
    return s_MR


def factor_grads(
    dy_MO: Tensor, x_MI: Tensor, s_MR: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, dx_MI: Tensor | None, add: bool
) -> tuple[Tensor, Tensor]:
    """dA and dB in fp32; ds A is added to dx, or written there."""
    if dy_MO.stride(-1) != 1:
        dy_MO = dy_MO.contiguous()
    if x_MI.stride(-1) != 1:
        x_MI = x_MI.contiguous()
    dA_RI, dB_OR = torch.empty_like(A_RI), torch.empty_like(B_OR)
    (M, I), (O, R) = x_MI.shape, B_OR.shape
    into, ld = (None, 0) if dx_MI is None else (dx_MI.data_ptr(), dx_MI.stride(0))
    library = _library()
    assert library is not None
    library.inlay_lowrank_backward(
        *(dy_MO.data_ptr(), dy_MO.stride(0), x_MI.data_ptr(), x_MI.stride(0), s_MR.data_ptr(), A_RI.data_ptr()),
        *(B_OR.data_ptr(), dA_RI.data_ptr(), dB_OR.data_ptr(), into, ld, int(add)),
        *(M, I, O, R, scale, library.level, _workers(M * max(I, O))),
    )
    return dA_RI, dB_OR


def cross(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """rowsum((W Aᵀ) * B) of shape (O,) in fp32, with A rounded to bf16."""
    (O, I), R = weight_OI.shape, len(A_RI)
    sums_O = torch.empty(O, dtype=torch.float32)
    library = _library()
    assert library is not None
    library.inlay_lowrank_cross(
        *(weight_OI.data_ptr(), weight_OI.stride(0), A_RI.data_ptr(), B_OR.data_ptr(), sums_O.data_ptr()),
        *(O, I, R, library.level, _workers(O * I)),
    )
    return sums_O


def _workers(work: int) -> int:
    return torch.get_num_threads() if work >= _THREADED_FROM else 1


class _Library:
    """The compiled functions and which instructions they may use: 1 AVX512-BF16, 2 AMX."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self.inlay_lowrank_forward = library.inlay_lowrank_forward
        self.inlay_lowrank_backward = library.inlay_lowrank_backward
        self.inlay_lowrank_cross = library.inlay_lowrank_cross
        self.inlay_lowrank_forward.argtypes = _FORWARD
        self.inlay_lowrank_backward.argtypes = _BACKWARD
        self.inlay_lowrank_cross.argtypes = _CROSS
        self.level = level


@cache
def _library() -> _Library | None:
    library = compiled.load("lowrank.c") if compiled.enabled() else None
    level = 0 if library is None else library.inlay_lowrank_level()
    return None if library is None or not level else _Library(library, level)
