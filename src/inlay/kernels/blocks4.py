"""Blockwise 4-bit quantisation at memory speed: in C on the CPU, by Triton or bitsandbytes on CUDA.

All forms give the same bits (`blocks4.c` against `inlay.quant.blockwise`); `Path` forces one of them in tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor

from inlay.errors import QuantizationError
from inlay.kernels import compiled, triton_select
from inlay.quant import blockwise
from inlay.quant.base import CodeBook, QuantState
from inlay.quant.double_quant import dequantize_absmax, dynamic_table
from inlay.quant.nf4 import NF4_BOOK

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_THREADED_FROM = 1 << 18  # weights; below, waking a thread costs more than the work


class Path(IntEnum):
    """The forms there are: torch, portable C, C with AVX2, C with AVX-512."""

    TORCH = -1
    PLAIN = 0
    AVX2 = 1
    AVX512 = 2


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.load("blocks4.c")
    if library is None:
        return None
    pointer, long, int_, float_ = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.inlay_dequantize4.argtypes = [
        *(pointer, long, long, pointer, pointer, pointer, pointer, int_, float_, pointer, int_, int_, int_)
    ]
    library.inlay_quantize4.argtypes = [pointer, int_, long, long, pointer, pointer, pointer, pointer, int_]
    return library


@cache
def best_path() -> Path:
    """The fastest form that works on this machine and agrees with the plain form."""
    library = _library()
    if library is None:
        return Path.TORCH
    candidates = [Path(number) for number in range(library.inlay_best_path(), -1, -1)]
    return next((path for path in candidates if _agrees(path)), Path.TORCH)


def _agrees(path: Path) -> bool:
    """Try a form on a few blocks: the compiler and its flags (`$CC`) are not ours, and a wrong bit stays unseen."""
    x = torch.linspace(-3, 3, 1021).sin_()
    expected, absmax = blockwise.quantize_blocks(x, NF4_BOOK)
    packed, scales = quantize(x, NF4_BOOK, path=path)
    state = QuantState(NF4_BOOK, 64, (1021,), torch.float32, absmax)
    agrees = torch.equal(packed, expected) and torch.equal(scales, absmax)
    for dtype in (torch.float32, torch.bfloat16):
        plain = dequantize(expected, state, torch.empty(1021, dtype=dtype), Path.TORCH)
        agrees &= torch.equal(dequantize(expected, state, torch.empty(1021, dtype=dtype), path), plain)
    if not agrees:
        compiled.log.warning("the compiled %s form of blocks4.c gives wrong bits and is not used", path.name)
    return agrees


def _pick(path: Path | None, *tensors: Tensor) -> Path:
    if path is not None:
        return path
    if not compiled.enabled() or any(t.device.type != "cpu" for t in tensors):
        return Path.TORCH
    return best_path()


def dequantize(packed: Tensor, state: QuantState, out: Tensor, path: Path | None = None) -> Tensor:
    """Write the dense weight into `out`: book[index] · scale in fp32, rounded once to the dtype of `out`.

    Args:
        packed: the bytes, in any dtype that holds them.
        out: contiguous, one element for each weight, fp32, bf16 or fp16.
        path: force a form; None takes the fastest that works here.
    """
    if out.is_meta:
        return out  # no bytes, nothing to decode
    packed = packed.detach().view(torch.uint8)
    taken = _pick(path, packed, out)
    if taken is not Path.TORCH and _dequantize_c(packed, state, out, taken):
        return out
    forms = () if path is not None else _gpu_forms(packed, state, out)
    if len(forms) > 1:
        key = ("dequantize4", triton_select.size_class(out.numel()), out.dtype, state.nested is None, out.device)
        chosen = triton_select.decided(key)
        if chosen is None:
            return triton_select.fastest(key, [partial(form, packed, state, out) for form in forms])
        forms = forms[chosen : chosen + 1]
    if forms:
        return forms[0](packed, state, out)
    absmax = state.absmax if state.nested is None else dequantize_absmax(state.absmax, state.nested)
    return blockwise.dequantize_blocks(packed, absmax, state.book, state.block_size, out)


Form = Callable[[Tensor, QuantState, Tensor], Tensor]


def _gpu_forms(packed: Tensor, state: QuantState, out: Tensor) -> tuple[Form, ...]:
    """What decodes on a GPU, all with the same bits: the kernel of bitsandbytes, and ours in Triton."""
    forms: tuple[Form, ...] = ()
    if packed.is_cuda and compiled.enabled() and state.book.name in ("nf4", "fp4") and _bitsandbytes():
        forms += (_dequantize_peer,)
    return (*forms, _dequantize_triton) if triton_select.usable(packed, out) else forms


def _dequantize_peer(packed: Tensor, state: QuantState, out: Tensor) -> Tensor:
    absmax = state.absmax if state.nested is None else dequantize_absmax(state.absmax, state.nested)
    settings = (state.block_size, state.book.name, out.shape, out.dtype)
    torch.ops.bitsandbytes.dequantize_4bit.out(packed, absmax, *settings, out=out)
    return out


def _dequantize_triton(packed: Tensor, state: QuantState, out: Tensor) -> Tensor:
    from inlay.kernels import triton_blocks4  # which imports Triton

    return triton_blocks4.dequantize(packed, state, out)


def _dequantize_c(packed: Tensor, state: QuantState, out: Tensor, path: Path) -> bool:
    library, dtype = _library(), _DTYPES.get(out.dtype)
    if library is None or dtype is None:
        return False
    absmax, codes, table, nested_shift, offset = scale_arguments(state)
    status = library.inlay_dequantize4(
        packed.data_ptr(),
        out.numel(),
        state.block_size,
        state.book.table(_CPU).data_ptr(),
        absmax.data_ptr(),
        None if codes is None else codes.data_ptr(),
        None if table is None else table.data_ptr(),
        nested_shift,
        offset,
        out.data_ptr(),
        dtype,
        int(path),
        _threads(out.numel()),
    )
    return bool(status == 0)


def scale_arguments(state: QuantState) -> tuple[Tensor, Tensor | None, Tensor | None, int, float]:
    """Where C finds the scales of blocks: absmax, or 8-bit codes, their map and the shift to their own scales."""
    nested = state.nested
    if nested is None:
        return state.absmax, None, None, 0, 0.0
    shift = nested.block_size.bit_length() - 1
    return nested.absmax, state.absmax, dynamic_table(_CPU), shift, float(nested.offset)


@cache
def _bitsandbytes() -> bool:
    """Whether the CUDA kernels of bitsandbytes can be had; they decode to the same bits."""
    try:
        import_module("bitsandbytes")
    except ImportError:
        return False
    return True


def quantize(x: Tensor, book: CodeBook, block_size: int = 64, path: Path | None = None) -> tuple[Tensor, Tensor]:
    """Pack a tensor; arguments and results are those of `blockwise.quantize_blocks`."""
    full = x.numel() - x.numel() % block_size
    path = _pick(path, x)
    library = _library() if path is not Path.TORCH and full else None
    if library is None or x.dtype not in _DTYPES:
        return blockwise.quantize_blocks(x, book, block_size)
    flat = x.detach().reshape(-1)
    packed = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32)
    midpoints, order = _decision(book)
    status = library.inlay_quantize4(
        flat.data_ptr(),
        _DTYPES[x.dtype],
        full,
        block_size,
        midpoints.data_ptr(),
        order.data_ptr(),
        absmax.data_ptr(),
        packed.data_ptr(),
        _threads(full),
    )
    if status != 0:
        return blockwise.quantize_blocks(x, book, block_size)
    if full < x.numel():
        tail, tail_absmax = blockwise.quantize_blocks(flat[full:], book, block_size)
        packed[full // 2 :], absmax[-1] = tail.view(-1), tail_absmax[0]
    if not bool(torch.isfinite(absmax).all()):
        raise QuantizationError(blockwise.NOT_FINITE)
    return packed.unsqueeze(1), absmax


_CPU = torch.device("cpu")


@cache
def _decision(book: CodeBook) -> tuple[Tensor, Tensor]:
    return torch.tensor(book.midpoints()), torch.tensor(book.order, dtype=torch.uint8)


def _threads(count: int) -> int:
    return torch.get_num_threads() if count >= _THREADED_FROM else 1
