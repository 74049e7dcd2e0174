"""The loss of every task as a sum over targets, so that batches of unequal size can be weighted exactly.

Legend: B rows, T tokens, C classes, W words of a class, V vocabulary, N targets that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.errors import TrainingError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Loss:
    """Sum of the losses of the targets of one batch (fp32, differentiable), and of each row alone (detached)."""

    total: Tensor
    per_row_B: Tensor
    right: Tensor  # how many targets are the model's first choice
    targets: int


HELD = ("labels", "start_positions", "end_positions", "answer_at", "answer_ids")
"""Inputs that are not the model's."""


def forward(model: nn.Module, inputs: Mapping[str, Tensor], task: str) -> Any:
    """The model's output without its own loss: labels stay here, except where the decoder's inputs are made of them.

    Of a language model that answers with a word, `logits` are the scores [B, C] of the classes.
    """
    given: dict[str, Any] = {k: v for k, v in inputs.items() if k not in HELD}
    if task == "seq2seq" and "decoder_input_ids" not in given:
        given["decoder_input_ids"] = _base(model).prepare_decoder_input_ids_from_labels(inputs["labels"])
    if task in ("causal-lm", "seq2seq"):
        given["use_cache"] = False
    output = model(**given)
    if "answer_ids" not in inputs:
        return output
    return SimpleNamespace(logits=word_scores(output.logits, inputs["answer_at"], inputs["answer_ids"]))


def word_scores(logits_BTV: Tensor, at_B: Tensor, ids_BCW: Tensor) -> Tensor:
    """The score [B, C] of each class: the mean logit of its words at one position of each row (`inlay.Verbalizer`)."""
    logits_BV = logits_BTV[torch.arange(len(at_B), device=at_B.device), at_B].float()
    there_BCW = ids_BCW >= 0
    found_BCW = logits_BV[:, None, :].expand(-1, ids_BCW.shape[1], -1).gather(2, ids_BCW.clamp_min(0))
    scores_BC: Tensor = (found_BCW * there_BCW).sum(-1) / there_BCW.sum(-1)
    return scores_BC


def _base(model: Any) -> Any:
    while not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TrainingError(
                f"{type(model).__name__} cannot make decoder inputs from labels, so it cannot be trained for seq2seq."
            )
        model = inner
    return model


def loss_of(output: Any, inputs: Mapping[str, Tensor], task: str, smoothing: float = 0.0) -> Loss:
    """The loss of a model's output on a batch.

    Cross-entropy for classes and tokens, the mean over classes of binary cross-entropy for sets of labels, squared
    error for numbers, the mean of both ends' cross-entropy for spans. Targets of -100 do not count.
    """
    if task == "question-answering":
        return _span_loss(output, inputs, smoothing)
    logits, labels = output.logits, inputs["labels"]
    if task == "regression":
        predicted_B = logits.float().squeeze(-1)
        loss_B = (predicted_B - labels.float()).square()
        return Loss(loss_B.sum(), loss_B.detach(), torch.zeros((), device=logits.device), len(loss_B))
    if labels.is_floating_point():
        loss_B = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)
        right = (logits > 0).eq(labels.bool()).all(-1).sum()
        return Loss(loss_B.sum(), loss_B.detach(), right, len(loss_B))
    if task in ("causal-lm", "seq2seq"):
        logits, labels = shifted(logits, labels, task)
    return _cross_entropy(logits, labels, smoothing)


def shifted(states: Tensor, labels: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """States (or logits) [B, T, ...] and the labels that they predict, one by one."""
    if task == "causal-lm":
        # Virtual tokens of a prompt stand before the text; only the text has labels.
        return states[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    return states, labels


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Loss:
    """Over [B, C] with labels [B], or [B, T, V] with labels [B, T]; rows without a target add nothing."""
    counted = labels != IGNORED
    logits_NC, labels_N = logits[counted].float(), labels[counted]
    loss_N = F.cross_entropy(logits_NC, labels_N, reduction="none", label_smoothing=smoothing)
    with torch.no_grad():
        row_N = counted.nonzero()[:, 0]
        per_row_B = torch.zeros(len(labels), device=loss_N.device).index_add_(0, row_N, loss_N.detach())
        right = (logits_NC.argmax(-1) == labels_N).sum()
    return Loss(loss_N.sum(), per_row_B, right, len(loss_N))


def _span_loss(output: Any, inputs: Mapping[str, Tensor], smoothing: float) -> Loss:
    start = _cross_entropy(output.start_logits, inputs["start_positions"], smoothing)
    end = _cross_entropy(output.end_logits, inputs["end_positions"], smoothing)
    both = (output.start_logits.argmax(-1) == inputs["start_positions"]) & (
        output.end_logits.argmax(-1) == inputs["end_positions"]
    )
    return Loss(
        (start.total + end.total) / 2,
        (start.per_row_B + end.per_row_B) / 2,
        both.sum(),
        len(both),
    )
