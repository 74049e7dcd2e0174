"""Quantise the linear layers of a model in memory, and make them dense again."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay.errors import QuantizationError
from inlay.kernels import blocks4
from inlay.quant.base import BlockQuantization, QuantState
from inlay.quant.bridge import logical_shape, weight_of
from inlay.quant.double_quant import quantize_absmax
from inlay.quant.linear import Linear4
from inlay.quant.nf4 import NF4
from inlay.quant.selection import config_entry, select, warn_about_dense_rest

M = TypeVar("M", bound=nn.Module)


def quantize(model: M, config: BlockQuantization | None = None) -> M:
    """Store the linear layers of a model in 4 bits, in place, one after the other.

    Embeddings, the output or task head, norms and biases stay as they are (`config.skip`). A `Conv1D` (GPT-2)
    becomes a `Linear4` on the transposed weight, as in transformers with bitsandbytes. The model's `config` gets the
    entry with which `from_pretrained` loads the saved checkpoint through bitsandbytes.

    Args:
        model: any module; each `nn.Linear` and `Conv1D` in it is a candidate.
        config: `NF4(...)`, `FP4(...)` or `Int4(...)`; None is `NF4()`.

    Returns:
        The same model.

    Raises:
        QuantizationError: nothing to quantise, weights that are not finite or not there, adapters already attached.
            The model is unchanged, unless a weight turned out not to be finite halfway.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    config = config or NF4()
    chosen, skip = select(model, config)
    chosen = {name: module for name, module in chosen.items() if not isinstance(module, Linear4)}
    for name, module in chosen.items():
        _check(name, module)
    for name, module in chosen.items():
        try:
            packed, state = pack(weight_of(module), config)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        prepare(module, config).store(packed, state)
    warn_about_dense_rest(model, skip)
    if hasattr(getattr(model, "config", None), "to_dict"):
        model.config.quantization_config = config_entry(model, config, skip)  # type: ignore[union-attr]
    return model


def _check(name: str, module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.device.type == "meta":
        raise QuantizationError(f"{name} is on the meta device; use load_quantized to quantise while loading")
    if not weight.is_floating_point() or weight.element_size() not in (2, 4):
        raise QuantizationError(f"{name} holds {weight.dtype}; only fp32, bf16 and fp16 weights can be quantised")


def pack(dense: Tensor, config: BlockQuantization) -> tuple[Tensor, QuantState]:
    """Quantise one (out, in) weight: the bytes in `config.storage`, and their state.

    Raises:
        QuantizationError: NaN or infinite values, or a number of bytes that does not fill the storage dtype.
    """
    packed, absmax = blocks4.quantize(dense, config.book, config.block_size)
    storage = getattr(torch, config.storage)
    if packed.numel() % storage.itemsize:
        raise QuantizationError(
            f"a weight of shape {tuple(dense.shape)} has {packed.numel()} packed bytes, which do not fill "
            f"storage={config.storage!r}; use storage='uint8'"
        )
    if storage is not torch.uint8:
        packed = packed.view(-1).view(storage).unsqueeze(1)
    nested = None
    if config.double_quant:
        absmax, nested = quantize_absmax(absmax)
    return packed, QuantState(config.book, config.block_size, tuple(dense.shape), dense.dtype, absmax, nested)


def prepare(module: nn.Module, config: BlockQuantization) -> Linear4:
    """Turn a dense leaf into an empty `Linear4`, in place."""
    shape = logical_shape(module)
    if isinstance(module, Conv1D):
        del module.nx, module.nf
    dtype = None if config.compute_dtype is None else getattr(torch, config.compute_dtype)
    return Linear4.prepare(module, shape, dtype)


def dequantize_model(model: M, dtype: torch.dtype | None = None) -> M:
    """Make every `Linear4` of a model an `nn.Linear` again, in place.

    Args:
        dtype: of the dense weights; None takes the dtype that each was quantised from.

    Returns:
        The same model. What quantisation rounded stays rounded, and a former `Conv1D` becomes an `nn.Linear`.
    """
    for module in model.modules():
        if isinstance(module, Linear4):
            make_dense(module, weight_of(module, dtype))
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config  # type: ignore[union-attr]
    return model


def make_dense(module: Linear4, weight: Tensor) -> None:
    """Turn one `Linear4` into an `nn.Linear` that holds `weight` (out, in), in place.

    Raises:
        QuantizationError: the class was swapped for a subclass, so something still hangs on the layer.
    """
    if type(module) is not Linear4:
        raise QuantizationError("the layer carries an adapter; detach it before the base is made dense")
    for name in ("absmax", "nested_absmax", "nested_offset"):
        delattr(module, name)
        module._non_persistent_buffers_set.discard(name)
    for name in ("quant_type", "block_size", "weight_dtype", "compute_dtype"):
        delattr(module, name)
    leaf: nn.Module = module
    leaf.__class__ = nn.Linear
    leaf.weight = nn.Parameter(weight, requires_grad=False)
