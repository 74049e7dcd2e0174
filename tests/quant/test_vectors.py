"""Recorded vectors of bitsandbytes 0.50.2, made from a generator that needs no library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inlay.kernels import blocks4
from inlay.quant.base import QuantState
from inlay.quant.double_quant import quantize_absmax
from inlay.quant.nf4 import NF4_BOOK

MASK = (1 << 64) - 1


def portable_normal(count: int, seed: int) -> Tensor:
    """Sums of twelve 16-bit draws of a 64-bit LCG: exact in fp32."""
    state, values = seed, []
    for _ in range(count):
        total = 0
        for _ in range(3):
            state = (state * 6364136223846793005 + 1442695040888963407) & MASK
            total += sum((state >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
        values.append((total - 6 * 65535) * 2.0**-16)
    return torch.tensor(values, dtype=torch.float32)


def sha(tensor: Tensor) -> str:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.view(torch.int16)
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return portable_normal(128 * 512, 20240229).view(128, 512) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_recorded_vectors(shared: Path, weight: Tensor, dtype: torch.dtype) -> None:
    recorded = json.loads((shared / "vectors" / "bnb_vectors.json").read_text())
    assert sha(weight) == recorded["input W fp32 (128,512) sha256"]
    name = str(dtype).removeprefix("torch.")
    packed, absmax = blocks4.quantize(weight.to(dtype), NF4_BOOK)
    assert sha(packed) == recorded[f"{name}: packed sha256"]
    assert sha(absmax) == recorded[f"{name}: absmax sha256"]
    out = torch.empty(128, 512, dtype=dtype)
    plain = QuantState(NF4_BOOK, 64, (128, 512), dtype, absmax)
    assert sha(blocks4.dequantize(packed, plain, out)) == recorded[f"{name}: dequant sha256"]
    codes, nested = quantize_absmax(absmax)
    assert float(nested.offset) == pytest.approx(recorded[f"{name}: nested offset"], rel=1e-6)
    double = QuantState(NF4_BOOK, 64, (128, 512), dtype, codes, nested)
    decoded = sha(blocks4.dequantize(packed, double, out))
    if float(nested.offset) == recorded[f"{name}: nested offset"]:  # the mean depends on the order of its sum
        assert sha(codes) == recorded[f"{name}: nested qabsmax (1024,) torch.uint8 sha256"]
        assert decoded == recorded[f"{name}: nested dequant sha256"]
