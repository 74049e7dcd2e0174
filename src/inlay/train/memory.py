"""What a training step will need in memory, from a forward pass on one row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.train.loss import forward, loss_of

MOMENT_BYTES = {"sgd": 4, "adafactor": 0, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state per trained value; AdamW's two fp32 moments where a name is absent."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a training step by cause."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(
    model: nn.Module,
    inputs: dict[str, Tensor],
    task: str,
    optim: str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Estimate:
    """The memory of one step on a batch like `inputs`.

    Activations are what autograd keeps in a forward pass on the first row, times the rows: a lower bound that leaves
    out what a kernel needs for itself.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = len(next(iter(inputs.values())))
    kept = saved_bytes(model, {name: tensor[:1] for name, tensor in inputs.items()}, task, autocast)
    count = sum(p.numel() for p in trained)
    return Estimate(
        weights=sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers()),
        gradients=sum(p.nbytes for p in trained),
        optimizer=count * MOMENT_BYTES.get(optim, 8),
        activations=kept * rows,
    )


def saved_bytes(
    model: nn.Module, inputs: dict[str, Tensor], task: str, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(),
    ):
        output = forward(model, inputs, task)
        loss = loss_of(output, inputs, task)
        total = sum(kept.values())
        del output, loss
    return total
