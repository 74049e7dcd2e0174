"""The tensors beside a packed weight in a state dict, exactly as bitsandbytes writes them.

Next to `<layer>.weight`, the packed bytes, stand `.absmax`, `.quant_map`, with double quantisation `.nested_absmax` and
`.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (fp4; or int4, which bitsandbytes refuses): JSON as bytes with
block sizes, shape and dtypes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import QuantizationError
from inlay.quant.base import BlockQuantization, CodeBook, Nested, QuantState
from inlay.quant.double_quant import NESTED_BLOCK, dynamic_map
from inlay.quant.fp4 import FP4
from inlay.quant.int4 import Int4
from inlay.quant.nf4 import NF4

CONFIGS: dict[str, type[BlockQuantization]] = {config.book.name: config for config in (NF4, FP4, Int4)}
BOOKS: dict[str, CodeBook] = {name: config.book for name, config in CONFIGS.items()}
META = "quant_state.bitsandbytes__"
KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(f"{META}{name}" for name in BOOKS))


def to_tensors(state: QuantState) -> dict[str, Tensor]:
    """The entries for a state dict, without prefix. The maps are fresh copies: safetensors refuses shared memory."""
    device = state.absmax.device
    tensors = {"absmax": state.absmax.detach(), "quant_map": state.book.table(device).clone()}
    meta: dict[str, Any] = {
        "quant_type": state.book.name,
        "blocksize": state.block_size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    if state.nested is not None:
        tensors["nested_absmax"] = state.nested.absmax.detach()
        tensors["nested_quant_map"] = dynamic_map().to(device)
        meta["nested_blocksize"] = state.nested.block_size
        meta["nested_dtype"] = "float32"
        meta["nested_offset"] = 0.0 if device.type == "meta" else float(state.nested.offset)
    tensors[META + state.book.name] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> QuantState:
    """The state that `to_tensors` wrote, on `device` (None: where `absmax` is).

    Raises:
        QuantizationError: an entry is missing or contradicts the others, or a code book is not the one it is named
            after.
    """
    kinds = [name for name in BOOKS if META + name in tensors]
    if len(kinds) != 1:
        raise QuantizationError(
            f"a packed 4-bit weight needs exactly one of {[META + name for name in BOOKS]} beside it, "
            f"found {sorted(tensors)}"
        )
    meta = _meta(tensors[META + kinds[0]])
    nested = "nested_offset" in meta
    needed = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    absent = [key for key in needed if key not in tensors]
    if absent:
        raise QuantizationError(f"a packed 4-bit weight without {absent}; the checkpoint is incomplete")
    book = BOOKS[kinds[0]]
    absmax = tensors["absmax"]
    device = device or absmax.device
    _check_map(tensors["quant_map"], book.table(), book.name)
    if not nested:
        return QuantState(
            book, meta["blocksize"], tuple(meta["shape"]), _dtype(meta["dtype"]), absmax.to(device, torch.float32)
        )
    _check_map(tensors["nested_quant_map"], dynamic_map(), "the dynamic 8-bit map")
    if meta.get("nested_blocksize") != NESTED_BLOCK:
        raise QuantizationError(f"nested scales in blocks of {meta.get('nested_blocksize')}; only {NESTED_BLOCK} exist")
    return QuantState(
        book,
        meta["blocksize"],
        tuple(meta["shape"]),
        _dtype(meta["dtype"]),
        absmax.to(device),
        Nested(
            tensors["nested_absmax"].to(device, torch.float32),
            torch.tensor(float(meta["nested_offset"]), device=device),
        ),
    )


def _meta(raw: Tensor) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(bytes(raw.tolist()).decode())
    except ValueError as error:
        raise QuantizationError(f"the quantisation state of a weight is not readable JSON ({error})") from None
    absent = {"blocksize", "dtype", "shape"} - meta.keys()
    if absent:
        raise QuantizationError(f"the quantisation state of a weight lacks {sorted(absent)}: {meta}")
    return meta


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise QuantizationError(f"the quantisation state of a weight names an unknown dtype {name!r}")
    return dtype


def _check_map(found: Tensor, expected: Tensor, name: str) -> None:
    if found.device.type != "meta" and not torch.equal(found.cpu().float(), expected):
        raise QuantizationError(f"the code book in the checkpoint is not that of {name}; its values are not decoded")
