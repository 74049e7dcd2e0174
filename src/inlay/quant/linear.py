"""A linear layer whose frozen weight is stored in 4 bits (arXiv:2305.14314, equation 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.errors import QuantizationError
from inlay.quant.base import QuantState
from inlay.quant.format import KEYS, from_tensors, to_tensors
from inlay.quant.product import Packed, linear4


class Linear4(nn.Linear):
    """`nn.Linear` on packed 4-bit weights: y = x Wᵀ + b with W = book[index] · scale.

    Made by `inlay.quantize` and `inlay.load_quantized`. The weight is never trained; the backward pass decodes it
    again, only where the input needs a gradient, and saves nothing but the packed bytes. The bias is an ordinary
    parameter.

    All state is on the instance (`weight` holds the bytes, buffers the scales), so its class may be swapped for a
    subclass. `state_dict` has the keys of bitsandbytes' `Linear4bit`, and files of either load into the other.
    Casting the module (`.half()`, `.to(torch.bfloat16)`) leaves bytes and scales as they are.
    """

    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    block_size: int
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype | None

    _SCALES: ClassVar = ("absmax", "nested_absmax", "nested_offset")

    @staticmethod
    def prepare(module: nn.Module, shape: tuple[int, int], compute_dtype: torch.dtype | None) -> Linear4:
        """Turn a dense leaf of (out, in) features into an empty `Linear4`, in place; `store` fills it."""
        module.__class__ = Linear4
        assert isinstance(module, Linear4)
        module.out_features, module.in_features = shape
        module.compute_dtype = compute_dtype
        for name in Linear4._SCALES:
            module.register_buffer(name, None, persistent=False)
        module.weight.requires_grad_(False)
        return module

    def store(self, packed: Tensor, state: QuantState) -> None:
        """Take over packed bytes and their state.

        Raises:
            QuantizationError: they belong to a weight of another shape.
        """
        expected = (self.out_features, self.in_features)
        bytes_ = packed.numel() * packed.element_size()
        if tuple(state.shape) != expected or bytes_ != -(-state.numel // 2):
            raise QuantizationError(
                f"a packed weight of shape {tuple(state.shape)} in {bytes_} bytes where {expected} is expected"
            )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = state.absmax
        self.nested_absmax = None if state.nested is None else state.nested.absmax
        self.nested_offset = None if state.nested is None else state.nested.offset
        self.quant_type, self.block_size, self.weight_dtype = state.book.name, state.block_size, state.dtype

    def packed(self) -> Packed:
        """The weight as plain values.

        Raises:
            QuantizationError: the layer was prepared and never filled.
        """
        if self.absmax is None:
            raise QuantizationError("this 4-bit layer was never filled; load its weight first")
        return Packed(
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.quant_type,
            self.block_size,
            self.out_features,
            self.in_features,
        )

    @property
    def quant_state(self) -> QuantState | None:
        """What decodes `weight`, or None before `store`."""
        return None if self.absmax is None else self.packed().state(self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the input, or that of autocast."""
        dtype, result_dtype, device = self.compute_dtype, input.dtype, input.device.type
        if torch.is_autocast_enabled(device):
            result_dtype = torch.get_autocast_dtype(device)
            dtype = dtype or result_dtype
        x_BI = input if dtype is None else input.to(dtype)
        return linear4(x_BI, self.bias, self.packed()).to(result_dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        parts = [super().extra_repr(), "empty"]
        if self.absmax is not None:
            parts[1:] = [self.quant_type, f"block_size={self.block_size}"]
            parts += ["double_quant"] if self.nested_absmax is not None else []
            parts += [] if self.compute_dtype is None else [f"compute_dtype={self.compute_dtype}"]
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4:
        # A cast would change the scales, and the packed bytes where they are declared as bf16.
        names = ("weight", *self._SCALES) if self.absmax is not None else ()
        before = {name: getattr(self, name).data for name in names if getattr(self, name) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            now = getattr(self, name)
            if now.dtype != kept.dtype:
                now.data = kept.to(now.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.quant_state
        if state is not None:
            for key, tensor in to_tensors(state).items():
                destination[f"{prefix}weight.{key}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        beside = {f"{name}.{key}": key for key in KEYS}
        stored = {key: state_dict[full] for full, key in beside.items() if full in state_dict}
        rest = {full: value for full, value in state_dict.items() if full not in beside}
        packed = rest.get(name)
        if packed is not None:
            if stored:
                self._take(name, packed, stored, local_metadata, error_msgs)
            else:
                error_msgs.append(f"{name} is dense and the layer is 4-bit: load it before quantising")
            rest[name] = self.weight  # nothing left to copy
        elif strict:
            unexpected_keys.extend(full for full in beside if full in state_dict)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _take(
        self,
        name: str,
        packed: Tensor,
        stored: dict[str, Tensor],
        local_metadata: dict[str, Any],
        error_msgs: list[str],
    ) -> None:
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        device = packed.device if assign or self.weight.device.type == "meta" else self.weight.device
        try:
            state = from_tensors({k: v if assign else v.clone() for k, v in stored.items()}, device)
            self.store(packed.detach().to(device, copy=not assign), state)
        except QuantizationError as error:
            error_msgs.append(f"{name}: {error}")
