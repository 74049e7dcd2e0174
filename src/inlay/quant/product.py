"""The product of activations with a packed 4-bit weight, and its gradient.

    y = x Wᵀ + b        dx = dy W        db = Σ dy

W is decoded inside the product (`kernels/blocks4_product.py`) or into a scratch buffer before it. Autograd keeps the
packed bytes, which are there anyway, and nothing else. Shapes: B leading dimensions of any number, M rows (all of them
as one), I in_features, O out_features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import blocks4, blocks4_product, gemm
from inlay.kernels.scratch import scratch
from inlay.quant.base import Nested, QuantState
from inlay.quant.format import BOOKS


class Packed(NamedTuple):
    """A packed weight as plain values, the form in which autograd and custom operators take arguments."""

    data: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    block_size: int
    out_features: int
    in_features: int

    def state(self, dtype: torch.dtype) -> QuantState:
        """The same as a `QuantState`."""
        nested = None
        if self.nested_absmax is not None and self.nested_offset is not None:
            nested = Nested(self.nested_absmax, self.nested_offset)
        shape = (self.out_features, self.in_features)
        return QuantState(BOOKS[self.quant_type], self.block_size, shape, dtype, self.absmax, nested)

    def linear(self, x_BI: Tensor, bias_O: Tensor | None) -> Tensor:
        """y_BO = x Wᵀ + b in the dtype of x, a fresh tensor; not differentiable."""
        bias_O = None if bias_O is None else bias_O.to(x_BI.dtype)
        y_BO = blocks4_product.product(x_BI, self.data, self.state(x_BI.dtype), bias_O)
        return gemm.linear(x_BI, self.scratch(x_BI.dtype), bias_O) if y_BO is None else y_BO

    def input_grad(self, dy_MO: Tensor) -> Tensor:
        """dx_MI = dy W in the dtype of dy, a fresh tensor; not differentiable."""
        dx_MI = blocks4_product.product(dy_MO, self.data, self.state(dy_MO.dtype), backward=True)
        return gemm.input_grad(dy_MO, self.scratch(dy_MO.dtype)) if dx_MI is None else dx_MI

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """W_OI in the scratch buffer of this thread: use it at once and keep nothing of it."""
        w_OI = scratch(self.out_features * self.in_features, dtype, self.data.device)
        return blocks4.dequantize(self.data, self.state(dtype), w_OI).view(self.out_features, self.in_features)


def linear4(x_BI: Tensor, bias_O: Tensor | None, packed: Packed) -> Tensor:
    """y_BO = x Wᵀ + b in the dtype of x.

    Differentiable once in x and b. Under `torch.compile` and `torch.export` it is one opaque operator.
    """
    if torch.compiler.is_compiling():
        y_BO: Tensor = torch.ops.inlay.linear4(x_BI, bias_O, *packed)
        return y_BO
    if torch.is_grad_enabled() and (x_BI.requires_grad or (bias_O is not None and bias_O.requires_grad)):
        result: Tensor = _Linear4.apply(x_BI, bias_O, *packed)  # type: ignore[no-untyped-call]
        return result
    return _forward(x_BI, bias_O, packed)


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The dense (out, in) tensor of packed bytes, in `dtype` or the one that was quantised."""
    if torch.compiler.is_compiling():
        nested = (None, None) if state.nested is None else (state.nested.absmax, state.nested.offset)
        settings = (state.book.name, state.block_size, *state.shape, dtype or state.dtype)
        compiled: Tensor = torch.ops.inlay.dequantize4(packed, state.absmax, *nested, *settings)
        return compiled
    out = torch.empty(state.shape, dtype=dtype or state.dtype, device=packed.device)
    return blocks4.dequantize(packed, state, out)


def _forward(x_BI: Tensor, bias_O: Tensor | None, packed: Packed) -> Tensor:
    with _no_autocast(x_BI.device.type):
        return packed.linear(x_BI, bias_O)


def _input_grad(dy_BO: Tensor, packed: Packed) -> Tensor:
    with _no_autocast(dy_BO.device.type):
        return packed.input_grad(dy_BO.reshape(-1, dy_BO.shape[-1])).view(*dy_BO.shape[:-1], packed.in_features)


def _bias_grad(dy_BO: Tensor, dtype: torch.dtype) -> Tensor:
    return dy_BO.reshape(-1, dy_BO.shape[-1]).sum(0, dtype=dtype)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    # The operands already have the dtype that was asked for. Entering a context costs more than asking.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Linear4(torch.autograd.Function):
    """Eager autograd. A custom operator would do, at seven times the overhead of this (58 µs against 8)."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, bias_O: Tensor | None, *packed: Any) -> Tensor:
        ctx.save_for_backward(*packed[:4])
        ctx.layout, ctx.bias_dtype = packed[4:], None if bias_O is None else bias_O.dtype
        return _forward(x_BI, bias_O, Packed(*packed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
        packed = Packed(*ctx.saved_tensors, *ctx.layout)
        dx_BI = _input_grad(dy_BO, packed) if ctx.needs_input_grad[0] else None
        db_O = _bias_grad(dy_BO, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return dx_BI, db_O, *([None] * len(packed))


_PACKED = (
    "Tensor data, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "str quant_type, SymInt block_size, SymInt out_features, SymInt in_features"
)


@torch.library.custom_op("inlay::linear4", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {_PACKED}) -> Tensor")
def _linear4_op(x: Tensor, bias: Tensor | None, *packed: Any) -> Tensor:
    return _forward(x, bias, Packed(*packed))


@torch.library.custom_op("inlay::linear4_input_grad", mutates_args=(), schema=f"(Tensor dy, {_PACKED}) -> Tensor")
def _input_grad_op(dy: Tensor, *packed: Any) -> Tensor:
    return _input_grad(dy, Packed(*packed))


@torch.library.custom_op("inlay::dequantize4", mutates_args=(), schema=f"({_PACKED}, ScalarType dtype) -> Tensor")
def _dequantize4_op(data: Tensor, *rest: Any) -> Tensor:
    *packed, dtype = rest
    layout = Packed(data, *packed)
    w_OI = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=data.device)
    return blocks4.dequantize(data, layout.state(dtype), w_OI)


@_dequantize4_op.register_fake
def _dequantize4_fake(data: Tensor, *rest: Any) -> Tensor:
    *packed, dtype = rest
    layout = Packed(data, *packed)
    return data.new_empty((layout.out_features, layout.in_features), dtype=dtype)


@_linear4_op.register_fake
def _linear4_fake(x: Tensor, bias: Tensor | None, *packed: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], Packed(*packed).out_features))


@_input_grad_op.register_fake
def _input_grad_fake(dy: Tensor, *packed: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], Packed(*packed).in_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias_O, *packed = inputs
    ctx.save_for_backward(*packed[:4])
    ctx.layout, ctx.bias_dtype = packed[4:], None if bias_O is None else bias_O.dtype


def _op_backward(ctx: Any, dy_BO: Tensor) -> tuple[Tensor | None, ...]:
    packed = Packed(*ctx.saved_tensors, *ctx.layout)
    dx_BI = torch.ops.inlay.linear4_input_grad(dy_BO, *packed) if ctx.needs_input_grad[0] else None
    db_O = _bias_grad(dy_BO, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return dx_BI, db_O, *([None] * len(packed))


_linear4_op.register_autograd(_op_backward, setup_context=_save)
