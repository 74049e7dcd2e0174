"""What a training step will need in memory: the step is followed on a copy of the model without weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay.planning.bases import stored_bytes
from inlay.planning.footprint import Footprint, Memory, optimizer_state
from inlay.planning.skeleton import twin
from inlay.planning.step import Conditions, inputs_like, record


def estimate(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    task: str,
    optim: str,
    *,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    accumulates: bool = False,
) -> Memory:
    """The memory of a step on a batch like `inputs`, at the moment when it needs most.

    The model is not run and not changed. What counts is tensors: the interpreter, libraries and the gaps of an
    allocator come on top (`benchmarks/plan_check.py` compares with what a process takes).

    Args:
        model: with its adapter, on its device.
        inputs: a batch as the model will get it.
        task: one of `inlay.config.Task`.
        optim: the optimizer's name.
        autocast: the dtype of forward passes, where it is not that of the weights.
        checkpointing: activations are computed again in the backward pass.
        accumulates: several batches make one step, so that gradients are there during forward passes.
    """
    first = next(iter(inputs.values()))
    device = "cuda" if first.is_cuda else "cpu"
    rows, mask = first.shape[0], inputs.get("attention_mask")
    conditions = Conditions(
        device="cuda" if first.is_cuda else "cpu",
        padded=mask is not None and not bool(mask.bool().all()),
        checkpointing=checkpointing,
        autocast=autocast,
    )
    timeline = record(twin(model), task, inputs_like(inputs, rows), conditions)
    trained = [p for p in model.parameters() if p.requires_grad]
    footprint = Footprint(
        weights=stored_bytes(model),
        gradients=sum(p.nbytes for p in trained),
        optimizer=optimizer_state(trained, optim, device),
        scratch=0,
        recordings={1: timeline},
        accumulates=accumulates,
    )
    return footprint.memory(rows, 1)
