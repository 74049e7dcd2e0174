"""Read the weight of any leaf, however it is stored: dense, ours, bitsandbytes 4 and 8 bit, torchao.

Layout is always (out, in): y = W x. For `Conv1D` (GPT-2) and `Embedding` that is the transpose of what they
hold; an embedding is the linear map of a one-hot row, so `in` is the vocabulary.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import QuantizationError
from inlay.quant.base import Nested, QuantState
from inlay.quant.format import BOOKS
from inlay.quant.product import dequantize


def logical_shape(module: nn.Module) -> tuple[int, int]:
    """The (out, in) features of a leaf, whatever its storage. Works on the meta device.

    Raises:
        QuantizationError: the module has no weight that maps features to features.
    """
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.Linear) or (_is_int(module, "in_features") and _is_int(module, "out_features")):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if _is_conv1d(module) and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    if is_pointwise(module):
        return int(module.out_channels), int(module.in_channels)  # type: ignore[arg-type]
    raise QuantizationError(
        f"a {type(module).__name__} is no linear map from features to features; "
        "Linear, Conv1D, Embedding, their quantised forms and convolutions of one position are"
    )


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution sees one position at a time, so that it is a projection of the features at axis 1."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    forward = getattr(type(module), "base", type(module)).forward
    plain = forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    unpadded = module.padding in ("same", "valid", (0,) * len(module.stride))
    return plain and unpadded and {*module.kernel_size, *module.stride} == {1}


def weight_of(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight of a leaf, (out, in), detached.

    Args:
        module: Linear, Conv1D, Embedding, or a quantised form of them.
        dtype: convert to this; None keeps the dtype that was quantised (fp32 where the storage does not
            record it: bitsandbytes 8 bit). A quantised weight is rounded to it once.

    Returns:
        A tensor that shares memory with a dense module: do not write into it. A quantised module gives a
        fresh one.

    Raises:
        QuantizationError: a storage that inlay cannot read, or a weight that is not there (sharded, on meta).
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise QuantizationError(f"a {type(module).__name__} has no weight tensor")
    if weight.device.type == "meta":
        raise QuantizationError("the weight is on the meta device and has no values; load the model first")
    stored = four_bit_state(module)
    if stored is not None:
        packed, state = stored
        return dequantize(packed, state, dtype)
    scale = _int8_scale(module, weight)
    if scale is not None:
        # 1/127 as fp32 and this order of products are those of bitsandbytes' int8_vectorwise_dequant.
        dense = weight.detach() * scale.view(-1, 1) * 7.874015718698502e-3
    elif _is_torchao(weight):
        dense = weight.detach().dequantize()
    elif weight.is_floating_point() and weight.element_size() > 1:
        dense = weight.detach()
    else:
        raise QuantizationError(
            f"a {type(module).__name__} holds a {type(weight).__name__} of {weight.dtype}, which inlay "
            "cannot read; it reads dense weights, bitsandbytes 4 and 8 bit, its own 4 bit, torchao"
        )
    if isinstance(module, nn.Embedding) or _is_conv1d(module):
        dense = dense.t()
    elif is_pointwise(module):
        # Each group of features has a block of its own on the diagonal.
        groups = int(module.groups)  # type: ignore[arg-type]
        blocks = dense.flatten(1)
        dense = blocks if groups == 1 else torch.block_diag(*blocks.chunk(groups))
    if tuple(dense.shape) != logical_shape(module):
        raise QuantizationError(
            f"the weight of this {type(module).__name__} has shape {tuple(dense.shape)} instead of "
            f"{logical_shape(module)}: it is sharded or was freed; gather it first"
        )
    return dense if dtype is None else dense.to(dtype)


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of this leaf is stored in fewer bits than it computes in."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return (
        four_bit_state(module) is not None
        or _is_torchao(weight)
        or not (weight.is_floating_point() and weight.element_size() > 1)
    )


def four_bit_state(module: nn.Module) -> tuple[Tensor, QuantState] | None:
    """The packed bytes and state of a 4-bit leaf, ours or bitsandbytes', or None."""
    state = getattr(module, "quant_state", None)
    if isinstance(state, QuantState):
        return module.weight.detach(), state  # type: ignore[operator]
    weight = getattr(module, "weight", None)
    if "bitsandbytes" not in sys.modules or type(weight).__name__ != "Params4bit":
        return None
    # Under FSDP the parameter loses its state and the module keeps it.
    state = getattr(weight, "quant_state", None) or state
    if state is None:
        return None  # not quantised yet: the parameter still holds dense values
    data: Tensor = weight.data  # type: ignore[union-attr]
    if getattr(state, "packing_format_for_cpu", False):
        return _unpacked_for_cpu(data, state)
    return data, _from_bitsandbytes(state)


def _unpacked_for_cpu(data: Tensor, state: Any) -> tuple[Tensor, QuantState]:
    """Take back what a bitsandbytes eval forward did to a layer on a CPU with AVX512-BF16.

    It repacks the bytes and keeps the scales transposed and rounded to bf16. The layout is recovered, the
    rounding is not. bitsandbytes' own inverse changes the state it is given and forgets to transpose plain
    scales.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    packed, _ = _convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    absmax = state.absmax.t().reshape(-1).float()
    book = BOOKS[state.quant_type]
    return packed, QuantState(book, state.blocksize, tuple(state.shape), state.original_dtype, absmax)


def _from_bitsandbytes(state: Any) -> QuantState:
    nested = None
    if state.nested:
        nested = Nested(state.state2.absmax.float(), state.offset.float(), state.state2.blocksize)
    return QuantState(
        book=BOOKS[state.quant_type],
        block_size=state.blocksize,
        shape=tuple(state.shape),
        dtype=state.dtype,
        absmax=state.absmax if nested is not None else state.absmax.float(),
        nested=nested,
    )


def _int8_scale(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The row scales of a bitsandbytes 8-bit layer; its first forward moves them from weight to module."""
    if type(weight).__name__ != "Int8Params" or weight.dtype != torch.int8:
        return None
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if not isinstance(scale, Tensor):
        raise QuantizationError("an 8-bit layer without its row scales (SCB); move the model to its device first")
    return scale.to(weight.device)


def _is_torchao(weight: Tensor) -> bool:
    """torchao weights are tensor subclasses; `Parameter` keeps that subclass as its own type."""
    # The plain types first: the compiler cannot look into the bases of a tensor class.
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return any(cls.__module__.partition(".")[0] == "torchao" for cls in type(weight).__mro__)


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that reading a weight does not import transformers. Hosts subclass the leaf's class.
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
    )


def _is_int(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), int)
