"""How frozen weights are stored: NF4, FP4 and Int4 in the format of bitsandbytes, and a bridge to other formats."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inlay.quant.bridge import is_quantized as is_quantized
from inlay.quant.bridge import logical_shape as logical_shape
from inlay.quant.bridge import weight_of as weight_of
from inlay.quant.fp4 import FP4 as FP4
from inlay.quant.int4 import Int4 as Int4
from inlay.quant.nf4 import NF4 as NF4

if TYPE_CHECKING:
    from inlay.quant.linear import Linear4 as Linear4
    from inlay.quant.loading import load_quantized as load_quantized
    from inlay.quant.model import dequantize_model as dequantize_model
    from inlay.quant.model import quantize as quantize
    from inlay.quant.replace import Stored as Stored
    from inlay.quant.replace import damage as damage
    from inlay.quant.replace import requantise as requantise
    from inlay.quant.replace import restore as restore

# These import transformers, which reading a weight does not need.
_LAZY = {
    "Linear4": "inlay.quant.linear",
    "Stored": "inlay.quant.replace",
    "damage": "inlay.quant.replace",
    "dequantize_model": "inlay.quant.model",
    "load_quantized": "inlay.quant.loading",
    "quantize": "inlay.quant.model",
    "requantise": "inlay.quant.replace",
    "restore": "inlay.quant.replace",
}

__all__ = ["FP4", "NF4", "Int4", "is_quantized", "logical_shape", "weight_of", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
