"""The loss of a language model whose output projection is frozen, without its logits.

The projection is the last thing that most language models do, so it can be left to the loss, which takes it some tokens
at a time (`inlay.kernels.cross_entropy`) and only at tokens that have a target. Whether a model is of that kind is not
looked up but seen: on one row, what the projection returns must be the very tensor that the model returns as logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels.cross_entropy import linear_cross_entropy
from inlay.train.loss import IGNORED, Loss, forward, loss_of, shifted

TASKS = ("causal-lm", "seq2seq")


class OutputHead:
    """The frozen output projection of one model, seen once."""

    def __init__(self, model: nn.Module, task: str) -> None:
        self.model, self.task = model, task
        self.leaf = _frozen_projection(model) if task in TASKS else None
        self._last: bool | None = None

    def loss(self, inputs: Mapping[str, Tensor], smoothing: float) -> Loss:
        """The loss of the model on a batch: `loss_of(forward(...))` in value and gradient."""
        leaf = self.leaf
        if leaf is None or leaf.weight.requires_grad or _halved(leaf) or not self._is_last(inputs):
            return loss_of(forward(self.model, inputs, self.task), inputs, self.task, smoothing)
        with _passing_through(leaf):
            hidden_BTI = forward(self.model, inputs, self.task).logits
        hidden_BTI, labels_BT = shifted(hidden_BTI, inputs["labels"], self.task)
        counted_BT = labels_BT != IGNORED
        found = linear_cross_entropy(
            hidden_BTI[counted_BT], leaf.weight, leaf.bias, labels_BT[counted_BT], smoothing=smoothing
        )
        row_N = counted_BT.nonzero()[:, 0]
        per_row_B = torch.zeros(len(labels_BT), device=found.loss_N.device).index_add_(0, row_N, found.loss_N.float())
        return Loss(found.total, per_row_B, found.right_N.sum(), len(row_N))

    def _is_last(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the model's logits are what the projection returns; tried on one row, leaving random state alone."""
        if self._last is None and self.leaf is not None:
            returned: list[Any] = []
            handle = self.leaf.register_forward_hook(lambda *call: returned.append(call[-1]))
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=devices):
                    output = forward(self.model, _first_row(inputs), self.task)
            finally:
                handle.remove()
            self._last = len(returned) == 1 and output.logits is returned[0]
        return bool(self._last)


def _frozen_projection(model: Any) -> nn.Linear | None:
    """The output projection, if it is a plain frozen layer that nothing else watches or wraps."""
    if hasattr(model, "_orig_mod") or not hasattr(model, "get_output_embeddings"):
        return None  # compiled, wrapped, or no language model
    leaf = model.get_output_embeddings()
    plain = type(leaf) is nn.Linear and type(leaf.weight) is nn.Parameter and "forward" not in leaf.__dict__
    if not plain or any(p.requires_grad for p in leaf.parameters()):
        return None
    hooks = (leaf._forward_hooks, leaf._forward_pre_hooks, leaf._backward_hooks, leaf._backward_pre_hooks)
    return None if any(hooks) else leaf


def _first_row(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    rows = {len(v) for v in inputs.values()}
    return inputs if len(rows) > 1 else {k: v[:1] for k, v in inputs.items()}


def _halved(leaf: nn.Linear) -> bool:
    """In fp16 a gradient taken before the loss is scaled up would vanish."""
    device = leaf.weight.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or leaf.weight.dtype == torch.float16


@contextmanager
def _passing_through(leaf: nn.Module) -> Iterator[None]:
    """The projection returns what it is given."""
    leaf.__dict__["forward"] = _same
    try:
        yield
    finally:
        del leaf.__dict__["forward"]


def _same(x: Tensor) -> Tensor:
    return x
