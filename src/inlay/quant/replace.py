"""Store another dense weight in a leaf that is quantised, and say what that did to the change.

A 4-bit grid is coarse beside an adapter's update: what rounding loses of it is measured, never guessed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import QuantizationError
from inlay.quant.base import QuantState
from inlay.quant.blockwise import NOT_FINITE
from inlay.quant.bridge import four_bit_state, logical_shape
from inlay.quant.format import CONFIGS, to_tensors
from inlay.quant.linear import Linear4
from inlay.quant.model import pack


@dataclass(frozen=True, eq=False)
class Stored:
    """What a quantised leaf held, bit for bit; `restore` puts it back."""

    parameter: nn.Parameter
    attributes: dict[str, Any] = field(repr=False)
    int8: tuple[Any, Any] | None = field(default=None, repr=False)


def requantise(module: nn.Module, dense_weight: Tensor) -> Stored:
    """Replace the weight of a quantised leaf, in the format it has.

    Args:
        module: `Linear4`, or a `Linear4bit` or `Linear8bitLt` of bitsandbytes.
        dense_weight: (out, in), any floating-point dtype.

    Returns:
        What the leaf held before, for `restore`.

    Raises:
        QuantizationError: another storage, another shape, values that are not finite.
    """
    shape = logical_shape(module)
    if tuple(dense_weight.shape) != shape:
        raise QuantizationError(f"a weight of shape {tuple(dense_weight.shape)} where {shape} is expected")
    before = _snapshot(module)
    dense = dense_weight.detach().to(before.parameter.device)
    four_bit = four_bit_state(module)
    if four_bit is not None:
        _store_4bit(module, dense, *four_bit)
    elif before.int8 is not None:
        _store_8bit(module, dense)
    else:
        raise QuantizationError(
            f"a {type(module).__name__} with a {type(module.weight).__name__} cannot be quantised again by inlay; "
            "merge into a dense copy of the model instead"
        )
    return before


def _store_4bit(module: Any, dense: Tensor, packed: Tensor, state: QuantState) -> None:
    # A forward of bitsandbytes on AVX512-BF16 forgets that the scales were nested; the parameter still knows.
    nested = state.nested is not None or bool(getattr(module.weight, "compress_statistics", False))
    cls, storage = CONFIGS[state.book.name], str(packed.dtype).removeprefix("torch.")
    new_packed, new = pack(dense, cls(double_quant=nested, block_size=state.block_size, storage=storage))
    new = replace(new, dtype=state.dtype)
    if isinstance(module, Linear4):
        module.store(new_packed, new)
    else:
        from bitsandbytes.nn.modules import Params4bit

        tensors = to_tensors(new)
        module.weight = Params4bit.from_prequantized(new_packed, tensors, device=dense.device, module=module)


def _store_8bit(module: Any, dense: Tensor) -> None:
    from bitsandbytes.nn.modules import Int8Params

    if not bool(torch.isfinite(dense).all()):
        raise QuantizationError(NOT_FINITE)
    module.weight = Int8Params(dense, requires_grad=False, has_fp16_weights=False)._quantize(dense.device)
    module.state.CB = module.state.SCB = None


def restore(module: nn.Module, stored: Stored) -> None:
    """Put back what `requantise` replaced: the same tensors, so the same bits."""
    module.weight = stored.parameter
    for name, value in stored.attributes.items():
        setattr(module, name, value)
    if stored.int8 is not None:
        module.state.CB, module.state.SCB = stored.int8  # type: ignore[union-attr]


def damage(base: Tensor, delta: Tensor, result: Tensor) -> float:
    """How much of an update rounding destroyed: ‖result − (base + delta)‖ / ‖delta‖ (Frobenius).

    0 is a perfect merge. At 1 the error is as large as the update itself: the adapter is as good as lost.
    """
    size = delta.double().norm()
    if size == 0:
        return 0.0
    return float((result.double() - base.double() - delta.double()).norm() / size)


def _snapshot(module: nn.Module) -> Stored:
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    if isinstance(module, Linear4):
        names = ("absmax", "nested_absmax", "nested_offset", "quant_type", "block_size", "weight_dtype")
        return Stored(parameter, {name: getattr(module, name) for name in names})
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn.modules import Int8Params, Params4bit

        if isinstance(parameter, Params4bit):
            return Stored(parameter, {"quant_state": module.quant_state})
        if isinstance(parameter, Int8Params) and parameter.dtype == torch.int8:
            state: Any = module.state
            return Stored(parameter, {}, (state.CB, state.SCB))
    return Stored(parameter, {})
