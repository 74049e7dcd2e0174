"""Products with a packed 4-bit weight that is decoded while it is multiplied, in C.

    y = x Wᵀ + b        dx = dy W

A dense copy of W would be written to memory and read again twice in a training step. Here pieces of it are decoded into
the layout that the processor multiplies and stay in its caches. Sums are fp32; the result is that of decoding and
multiplying up to the order of the sums: within 1e-6 of the exact product in fp32 (norms), within its rounding in bf16.

Which form multiplies follows from the shape, the dtype and the processor alone, never from a measurement, so that a run
that is resumed, or repeated beside other work, gives the same bits. The number of threads does not change them either.

Shapes: B leading dimensions of any number, M rows (all of them as one), I features entering, O
features leaving; K are summed, N result.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from inlay.kernels import blocks4, compiled
from inlay.kernels.scratch import scratch
from inlay.quant.base import QuantState
from inlay.quant.blockwise import quantize_blocks
from inlay.quant.nf4 import NF4_BOOK

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_THREADED_FROM = 1 << 22  # multiplications; below, waking a thread costs more than the work


class Form(IntEnum):
    """What multiplies: AVX-512 (in bf16 its dot products), or AMX tiles."""

    VECTOR = 0
    AMX = 1


MOST_ROWS = {
    (Form.AMX, torch.bfloat16): 1 << 62,
    (Form.VECTOR, torch.bfloat16): 16,
    (Form.VECTOR, torch.float32): 192,
}
"""Rows up to which each form beats decoding first, from `benchmarks/quant_speed.py --tables product`."""


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.load("blocks4_product.c")
    if library is None:
        return None
    pointer, long, int_, float_ = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.inlay_product4.argtypes = [
        *(pointer, long, pointer, long, long, long),
        *(pointer, pointer, pointer, pointer, int_, float_),
        *(pointer, pointer, int_, int_, int_, pointer, int_),
    ]
    library.inlay_product4_workspace.argtypes = [long, long, long, int_, int_]
    library.inlay_product4_workspace.restype = long
    return library


@cache
def best_form(dtype: torch.dtype) -> Form | None:
    """The form that products of this dtype take on this machine, None for none."""
    library = _library()
    if library is None or dtype not in _DTYPES:
        return None
    found = library.inlay_product4_form(_DTYPES[dtype])
    return Form(found) if found >= 0 and _agrees(Form(found), dtype) else None


def _agrees(form: Form, dtype: torch.dtype) -> bool:
    """Try both directions on a small weight: the compiler and its flags (`$CC`) are not ours."""
    weight_OI = torch.linspace(-3, 3, 64 * 192).sin_().view(64, 192)
    packed, absmax = quantize_blocks(weight_OI, NF4_BOOK)
    state = QuantState(NF4_BOOK, 64, (64, 192), dtype, absmax)
    w_OI = blocks4.dequantize(packed, state, torch.empty(64, 192, dtype=dtype), blocks4.Path.TORCH).double()
    agrees = True
    for backward in (False, True):
        a_MK = torch.linspace(0, 40, 19 * (64 if backward else 192)).cos_().view(19, -1).to(dtype)
        exact = a_MK.double() @ (w_OI if backward else w_OI.t())
        ours = product(a_MK, packed, state, None, backward, form)
        bound = 1e-6 if dtype == torch.float32 else 4e-3
        agrees &= ours is not None and float((ours - exact).norm()) <= bound * float(exact.norm())
    if not agrees:
        compiled.log.warning("the compiled %s form of blocks4_product.c is wrong in %s and not used", form.name, dtype)
    return agrees


def product(
    a_BK: Tensor,
    packed: Tensor,
    state: QuantState,
    bias_O: Tensor | None = None,
    backward: bool = False,
    form: Form | None = None,
) -> Tensor | None:
    """x Wᵀ + b (a is x), or dy W (`backward`, a is dy); a fresh tensor, not differentiable.

    None where the weight should be decoded first: on other devices and dtypes, for rows of W that are cut by blocks
    (I must be a multiple of 64, O of 32), for blocks of 32, and for many rows.

    Args:
        packed: the bytes, in any dtype that holds them.
        bias_O: in the dtype of a.
        form: force one; None takes the best, within its bounds.
    """
    O, I = state.shape
    if form is None:
        if not (a_BK.is_cpu and packed.is_cpu and compiled.enabled()):
            return None
        form = best_form(a_BK.dtype)
        if form is None or a_BK.numel() > MOST_ROWS[form, a_BK.dtype] * a_BK.shape[-1]:
            return None
    library = _library()
    if library is None or I % 64 or O % 32 or state.block_size % 64 or a_BK.numel() == 0:
        return None
    a_MK = a_BK.reshape(-1, a_BK.shape[-1]).contiguous()
    (M, K), N, dtype = a_MK.shape, I if backward else O, _DTYPES[a_MK.dtype]
    threads = torch.get_num_threads() if max(M, 16) * O * I >= _THREADED_FROM else 1
    workspace = scratch(library.inlay_product4_workspace(M, K, N, dtype, threads), torch.uint8, a_MK.device)
    out_MN = torch.empty(M, N, dtype=a_MK.dtype)
    absmax, codes, table, shift, offset = blocks4.scale_arguments(state)
    bias_O = None if bias_O is None else bias_O.contiguous()
    status = library.inlay_product4(
        a_MK.data_ptr(),
        M,
        packed.data_ptr(),
        O,
        I,
        state.block_size,
        state.book.table().data_ptr(),
        absmax.data_ptr(),
        None if codes is None else codes.data_ptr(),
        None if table is None else table.data_ptr(),
        shift,
        offset,
        None if bias_O is None else bias_O.data_ptr(),
        out_MN.data_ptr(),
        dtype,
        int(backward),
        int(form),
        workspace.data_ptr(),
        threads,
    )
    return out_MN.view(*a_BK.shape[:-1], N) if status == 0 else None
