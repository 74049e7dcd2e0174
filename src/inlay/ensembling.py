"""Prompt ensembling: several adapters on the same rows in one pass, and one answer (Lester et al. 2021, section 6).

Legend: N adapters, B rows, C classes, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError, nearest
from inlay.state import use

Vote = Literal["majority", "mean"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The answer of several adapters to each row of a batch.

    Attributes:
        predictions: the class of each row [B].
        log_probs: the average of the adapters' log-probabilities [B, C].
        votes: how many adapters chose each class [B, C].
        each: the log-probabilities of each adapter [N, B, C].
    """

    predictions: Tensor
    log_probs: Tensor
    votes: Tensor
    each: Tensor


@dataclass(frozen=True, eq=False)
class GeneratedEnsemble:
    """The text of several adapters for each row of a batch.

    Attributes:
        sequences: the chosen sequence of each row [B, T], as `generate` gives it.
        votes: how many adapters generated it [B].
        each: the sequences of each adapter [N, B, T].
    """

    sequences: Tensor
    votes: Tensor
    each: Tensor


def ensemble(
    model: nn.Module,
    names: Sequence[str],
    batch: Mapping[str, Any],
    vote: Vote = "majority",
    *,
    read: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
) -> Ensemble:
    """Runs every row with every adapter in one forward pass, without gradients, and lets them vote.

    Args:
        model: a model with these adapters; any methods, prompts most of all.
        names: the adapters.
        batch: the inputs; each tensor has the rows first. Labels are left out.
        vote: "majority", the paper's: the class that most adapters choose, the more probable one of equals; "mean": the
            highest average log-probability.
        read: turns output and inputs into scores [rows, C]; by default `output.logits` of a classifier. For a language
            model `verbalizer.scores`.

    Raises:
        AdapterError: an unknown adapter, or an output that holds no classes.
    """
    inputs = replicated(names, batch, vote)
    with torch.no_grad(), use(model, rows_of(names, inputs)):
        output = model(**inputs)
    scores: Tensor = output.logits if read is None else read(output, inputs)
    if scores.ndim != 2:
        raise AdapterError(
            f"the scores have shape {tuple(scores.shape)}, not [rows, classes]. Pass read=, for example a verbalizer's "
            "scores, or use ensemble_generate() where the answer is a text."
        )
    return decide(scores, len(names), vote)


def decide(scores: Tensor, count: int, vote: Vote) -> Ensemble:
    """The answer to scores [N B, C] of `count` adapters, one after another."""
    each_NBC = scores.float().log_softmax(-1).reshape(count, -1, scores.shape[-1])
    log_probs_BC = each_NBC.mean(0)
    votes_BC = torch.nn.functional.one_hot(each_NBC.argmax(-1), scores.shape[-1]).sum(0)
    decided_BC = log_probs_BC
    if vote == "majority":
        most_B1 = votes_BC.max(-1, keepdim=True).values
        decided_BC = log_probs_BC.masked_fill(votes_BC < most_B1, -torch.inf)
    return Ensemble(decided_BC.argmax(-1), log_probs_BC, votes_BC, each_NBC)


def ensemble_generate(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, Any], vote: Vote = "majority", **settings: Any
) -> GeneratedEnsemble:
    """Generates for every row with every adapter in one call, and takes one text.

    Args:
        model: a model with these adapters that can `generate`.
        names: the adapters.
        batch: the inputs; each tensor has the rows first.
        vote: "majority": the sequence that most adapters generate, the one of the first of them among equals; "mean":
            one sequence from the average of their log-probabilities at each step.
        settings: of `generate`. "mean" decodes greedily or with beams, not by sampling.

    Raises:
        AdapterError: an unknown adapter, or settings with more than one sequence for a row.
    """
    if settings.get("num_return_sequences", 1) != 1 or settings.get("return_dict_in_generate"):
        raise AdapterError("ensemble_generate() takes one sequence for each row, and gives tensors.")
    count, inputs = len(names), replicated(names, batch, vote)
    if vote == "mean":
        settings = _averaging(model, settings, count)
    with use(model, rows_of(names, inputs)):
        sequences: Tensor = model.generate(**inputs, **settings)  # type: ignore[operator]
    each_NBT = sequences.reshape(count, -1, sequences.shape[-1])
    same_NNB = (each_NBT[:, None] == each_NBT[None]).all(-1)
    votes_NB = same_NNB.sum(1)
    order_N1 = torch.arange(count, device=sequences.device)[:, None]
    chosen_B = torch.where(votes_NB == votes_NB.max(0).values, order_N1, count).min(0).values
    rows_B = torch.arange(len(chosen_B), device=sequences.device)
    return GeneratedEnsemble(each_NBT[chosen_B, rows_B], votes_NB[chosen_B, rows_B], each_NBT)


def _averaging(model: Any, settings: dict[str, Any], count: int) -> dict[str, Any]:
    from transformers import LogitsProcessor, LogitsProcessorList

    if settings.get("do_sample", model.generation_config.do_sample):
        raise AdapterError(
            "vote='mean' decodes one text from all adapters; samples would differ. Pass do_sample=False."
        )

    class Mean(LogitsProcessor):
        """The average log-probability over the adapters, for all of their copies of a row."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            mean = scores.log_softmax(-1).reshape(count, -1, scores.shape[-1]).mean(0)
            return mean.repeat(count, 1)

    own = settings.get("logits_processor") or []
    return {**settings, "do_sample": False, "logits_processor": LogitsProcessorList([*own, Mean()])}


def replicated(names: Sequence[str], batch: Mapping[str, Any], vote: str) -> dict[str, Any]:
    """The inputs once for each adapter, one after another."""
    if vote not in ("majority", "mean"):
        raise AdapterError(f"vote={vote!r} is not known: {nearest(vote, ['majority', 'mean'])}")
    if isinstance(names, str) or not names:
        raise AdapterError(f"an ensemble needs a list of adapter names, not {names!r}.")
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim and name != "labels"}
    if not tensors:
        raise AdapterError("the batch holds no tensors with rows.")
    others = {name: x for name, x in batch.items() if name not in tensors and name != "labels"}
    return {**{name: x.repeat(len(names), *[1] * (x.ndim - 1)) for name, x in tensors.items()}, **others}


def rows_of(names: Sequence[str], inputs: Mapping[str, Any]) -> list[str | Sequence[str] | None]:
    """The adapter of each row of replicated inputs."""
    rows = next(x.shape[0] for x in inputs.values() if isinstance(x, Tensor)) // len(names)
    return [name for name in names for _ in range(rows)]
