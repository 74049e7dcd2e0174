"""Fill adapters with random values, and compare what a model computes and holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import inlay
from tiny import batch


def randomise(adapter: inlay.Adapter, seed: int = 0, size: float = 0.1) -> inlay.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "inlay" not in n.split(".")}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)
