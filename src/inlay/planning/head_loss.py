"""The loss of a language model whose output projection is frozen, as `inlay train` computes it: without all logits.

`inlay.train.output_head` leaves the projection to the loss, which takes it a piece of tokens at a time. Here the same
tensors are born, kept and freed, but for the pieces, of which one stands for all.

Legend: B rows, T tokens, N tokens with a target (here all), n tokens of a piece, I features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels.cross_entropy import FEWEST, PIECE
from inlay.planning.timeline import Recorder
from inlay.train.loss import shifted
from inlay.train.output_head import OutputHead


class Seen:
    """What went into the projection."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def is_last(self, logits: Tensor) -> bool:
        """Whether the model returns what the projection did, so that nothing (a soft cap) comes after it."""
        return len(self.inputs) == 1 and logits is self.inputs[0]


def frozen_projection(model: nn.Module, task: str, autocast: torch.dtype | None) -> nn.Module | None:
    """The projection that the loss will take, as far as can be told before a forward pass."""
    leaf = OutputHead(model, task).leaf
    in_half = autocast == torch.float16 or (leaf is not None and leaf.weight.dtype == torch.float16)
    return None if in_half else leaf


@contextmanager
def passing_through(leaf: nn.Module) -> Iterator[Seen]:
    """The projection returns what it is given."""
    seen = Seen()

    def same(x: Tensor) -> Tensor:
        seen.inputs.append(x)
        return x

    leaf.__dict__["forward"] = same
    try:
        yield seen
    finally:
        del leaf.__dict__["forward"]


def loss_in_pieces(
    hidden_BTI: Tensor,
    inputs: Mapping[str, Tensor],
    leaf: nn.Module,
    task: str,
    autocast: torch.dtype | None,
    recorder: Recorder,
) -> Tensor:
    """The loss from what enters the projection; every token is a target, since values are not known."""
    hidden_BTI, labels_BT = shifted(hidden_BTI, inputs["labels"], task)
    places_N2 = labels_BT.new_zeros(labels_BT.numel(), 2)
    h_NI = hidden_BTI[places_N2[:, 0], places_N2[:, 1]]
    weight_VI: Tensor = leaf.get_parameter("weight")
    if autocast is not None:
        h_NI, weight_VI = h_NI.to(autocast), weight_VI.detach().to(autocast)
    total: Tensor = _InPieces.apply(h_NI, weight_VI, recorder)  # type: ignore[no-untyped-call]
    return total


class _InPieces(torch.autograd.Function):
    """The memory and the arithmetic of `inlay.kernels.cross_entropy.linear_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, h_NI: Tensor, weight_VI: Tensor, recorder: Recorder) -> Tensor:
        vocabulary = len(weight_VI)
        rows = max(FEWEST, PIECE // vocabulary)
        wide = torch.promote_types(h_NI.dtype, torch.float32)

        def piece(dtype: torch.dtype) -> Tensor:
            made = h_NI.new_empty(len(h_NI), vocabulary, dtype=dtype)
            recorder.cap(made, rows * vocabulary * dtype.itemsize)
            return made

        loss_N = h_NI.new_empty(len(h_NI), dtype=wide)
        right_N = h_NI.new_empty(len(h_NI), dtype=torch.bool)
        dh_NI = torch.empty_like(h_NI)
        z_nV = piece(wide)
        exponentials_nV = piece(wide)
        del exponentials_nV  # of logsumexp
        dz_nV = z_nV if wide == h_NI.dtype else piece(h_NI.dtype)
        recorder.add_flops(4 * h_NI.numel() * vocabulary)
        del z_nV, dz_nV
        ctx.save_for_backward(dh_NI)
        total = loss_N.sum()
        del right_N
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (dh_NI,) = ctx.saved_tensors
        return dh_NI * dtotal.to(dh_NI.dtype), None, None
