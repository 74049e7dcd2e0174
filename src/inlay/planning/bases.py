"""How the frozen weights may be stored, and what that takes: read off the sizes of a model without weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from inlay.quant.bridge import logical_shape
from inlay.quant.nf4 import NF4
from inlay.quant.selection import select


@dataclass(frozen=True)
class Base:
    """One way to store a base: `name` on the command line, the dtype that it computes in, and how wide weights are."""

    name: str
    title: str
    compute: torch.dtype
    bits: int

    @property
    def double_quant(self) -> bool:
        """Whether the scales of 4-bit blocks are in 8 bits."""
        return self.name == "nf4-dq"


BASES = {
    base.name: base
    for base in (
        Base("fp32", "fp32", torch.float32, 32),
        Base("bf16", "bf16", torch.bfloat16, 16),
        Base("int8", "8-bit", torch.bfloat16, 8),
        Base("nf4", "NF4", torch.bfloat16, 4),
        Base("nf4-dq", "NF4+DQ", torch.bfloat16, 4),
    )
}
"""fp32 and bf16; LLM.int8 of bitsandbytes (arXiv:2208.07339); NF4 without and with double quantisation (2305.14314)."""

BLOCK, NESTED_BLOCK = 64, 256


@cache
def four_bits(count: int, double_quant: bool) -> int:
    """Bytes of `count` weights in 4 bits: packed, with a scale for each block of 64."""
    blocks = math.ceil(count / BLOCK)
    scales = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return math.ceil(count / 2) + scales


def quantised_leaves(model: nn.Module, base: Base) -> dict[str, nn.Module]:
    """The projections that a base keeps in 8 or 4 bits; none for a dense one.

    Raises:
        QuantizationError: there is nothing to quantise in this model.
    """
    return select(model, NF4(double_quant=base.double_quant))[0] if base.bits < 16 else {}


def weight_bytes(model: nn.Module, base: Base, leaves: dict[str, nn.Module]) -> int:
    """Bytes of the parameters and buffers of a model in `base.compute`, quantised leaves as the base stores them."""
    total = stored_bytes(model)
    for leaf in leaves.values():
        weight = leaf.get_parameter("weight")
        total -= weight.nbytes
        if base.bits == 8:
            total += weight.numel() + 4 * logical_shape(leaf)[0]  # a scale for each output
        else:
            total += four_bits(weight.numel(), base.double_quant)
    return total


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers()))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def decoding_bytes(leaves: dict[str, nn.Module], base: Base) -> int:
    """The buffer into which 4-bit weights are decoded, one at a time: as large as the largest of them."""
    if base.bits != 4:
        return 0
    counts = [leaf.get_parameter("weight").numel() for leaf in leaves.values()]
    return max(counts, default=0) * base.compute.itemsize


__all__ = ["BASES", "Base", "decoding_bytes", "four_bits", "quantised_leaves", "stored_bytes", "weight_bytes"]
