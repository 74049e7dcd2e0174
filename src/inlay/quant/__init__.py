"""How frozen weights are stored: NF4 and FP4 in the format of bitsandbytes, and a bridge to other formats."""

from __future__ import annotations

from inlay.quant.bridge import is_quantized, logical_shape, weight_of
from inlay.quant.fp4 import FP4
from inlay.quant.nf4 import NF4

__all__ = ["FP4", "NF4", "is_quantized", "logical_shape", "weight_of"]
