"""Measuring a model on held-out rows, and predicting for rows without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inlay.train import metrics
from inlay.train.contracts import EvaluationStopped
from inlay.train.distributed import Team, is_sharded
from inlay.train.loss import IGNORED, forward, loss_of
from inlay.train.signals import StopRequest

Run = Callable[[Any, Mapping[str, Tensor], str], Any]
Autocast = Callable[[], AbstractContextManager[Any]]


class Evaluator:
    """Measures a model on named sets; call it with a step.

    Args:
        model: in eval mode while called.
        sets: name -> encoded rows.
        batches: encoded rows -> batches in the order of the data.
        task: what is measured.
        tokenizer: decodes answer spans.
        autocast: the precision of the forward passes.
        stop: a signal ends the evaluation with `EvaluationStopped`.
        accelerator: with several processes each measures a part.
        after: called with (step, name of the set) after each set, to write samples.
        run: gives the output for a model, inputs and the task; another than `forward` where several adapters vote.
    """

    def __init__(
        self,
        model: Any,
        sets: Mapping[str, Any],
        batches: Callable[[Any], Any],
        task: str,
        tokenizer: Any,
        autocast: Autocast,
        *,
        stop: StopRequest | None = None,
        accelerator: Any = None,
        after: Callable[[int, str], None] | None = None,
        run: Run = forward,
    ) -> None:
        self.run = run
        self.model, self.sets, self.batches, self.task = model, sets, batches, task
        self.tokenizer, self.autocast, self.stop = tokenizer, autocast, stop
        self.team, self.after = Team(accelerator) if accelerator is not None else None, after

    def __call__(self, step: int) -> dict[str, dict[str, float]]:
        """Metrics of every set, and what is to be done after each. Random states are as before."""
        with _same_random_state():
            results = {}
            for name, encoded in self.sets.items():
                results[name] = self.measure(encoded)
                if self.after is not None:
                    self.after(step, name)
                    self._end_if_asked()
        return results

    def measure_all(self) -> dict[str, dict[str, float]]:
        """Metrics of every set."""
        with _same_random_state():
            return {name: self.measure(encoded) for name, encoded in self.sets.items()}

    def measure(self, encoded: Any) -> dict[str, float]:
        """The task's metrics on one set."""
        loss_sum, targets, right = 0.0, 0, 0
        predicted: dict[int, Any] = {}
        gold: dict[int, Any] = {}
        for batch, output in self._outputs(encoded):
            loss = loss_of(output, batch.inputs, self.task)
            loss_sum, targets, right = loss_sum + float(loss.total), targets + loss.targets, right + int(loss.right)
            if self.task not in ("causal-lm", "seq2seq"):
                guesses = decode(output, batch.inputs, self.task, encoded, batch.indices, self.tokenizer)
                for index, guess in zip(batch.indices, guesses, strict=True):
                    predicted[int(index)] = guess
                for index, truth in zip(
                    batch.indices, _gold(batch.inputs, self.task, encoded, batch.indices), strict=True
                ):
                    gold[int(index)] = truth
        if self.team is not None and self.team.size > 1:
            parts: list[Any] = self.team.gathered((loss_sum, targets, right, predicted, gold))
            loss_sum, targets, right = (sum(part[i] for part in parts) for i in range(3))
            predicted, gold = ({k: v for part in parts for k, v in part[i].items()} for i in (3, 4))
        loss_mean = loss_sum / max(targets, 1)
        order = sorted(predicted)
        return {"loss": loss_mean} | self._scores(
            [predicted[i] for i in order], [gold[i] for i in order], loss_mean, right, targets
        )

    def _scores(self, predicted: list[Any], gold: list[Any], loss: float, right: int, targets: int) -> dict[str, float]:
        if self.task in ("causal-lm", "seq2seq"):
            return metrics.language_model(loss, right, targets)
        if self.task == "sequence-classification":
            several = bool(gold) and isinstance(gold[0], list)
            return metrics.multilabel(predicted, gold) if several else metrics.classification(predicted, gold)
        if self.task == "regression":
            return metrics.regression(predicted, gold)
        if self.task == "token-classification":
            return metrics.tagging(predicted, gold)
        return metrics.answers(predicted, gold)

    def _outputs(self, encoded: Any) -> Iterator[tuple[Any, Any]]:
        """This process's batches with what the model makes of them; all processes make as many rounds."""
        batches, team = self.batches(encoded), self.team
        alone = team is None or team.size == 1
        own = iter(batches.epoch(0) if team is None or alone else batches.epoch(0, start=team.rank, step=team.size))
        for _ in itertools.count() if team is None or alone else range(-(-len(batches) // team.size)):
            self._end_if_asked()
            batch = next(own, None)
            if batch is not None:
                yield batch, self._forward(batch)
            elif alone:
                return
            elif is_sharded(self.model):  # weights are gathered from all processes
                self._forward(next(iter(batches.epoch(0))))

    def _end_if_asked(self) -> None:
        """After a signal to any of the processes all of them stop here."""
        signum = 0 if self.stop is None else self.stop.signum or 0
        if signum if self.team is None else self.team.largest(signum):
            raise EvaluationStopped

    def _forward(self, batch: Any) -> Any:
        with torch.no_grad(), self.autocast():
            return self.run(self.model, batch.inputs, self.task)


def _same_random_state() -> AbstractContextManager[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


def decode(
    output: Any, inputs: Mapping[str, Tensor], task: str, encoded: Any, indices: Iterable[int], tokenizer: Any
) -> list[Any]:
    """What the model says for each row: class number or 0/1 vector, number, tags of the labelled words, or text."""
    if task == "question-answering":
        return _spans(output, inputs, tokenizer)
    logits = output.logits.float()
    if task == "regression":
        return [float(value) for value in logits.flatten().tolist()]
    if task == "token-classification":
        names, labels = encoded.labels.names, inputs["labels"]
        return [
            [names[tag] for tag in row.argmax(-1)[marks != IGNORED].tolist()]
            for row, marks in zip(logits, labels, strict=True)
        ]
    if encoded.labels.several:
        return [[int(on) for on in row] for row in (logits > 0).tolist()]
    return [int(number) for number in logits.argmax(-1).tolist()]


def _gold(inputs: Mapping[str, Tensor], task: str, encoded: Any, indices: Iterable[int]) -> list[Any]:
    if task == "question-answering":
        return [encoded.reference(int(i)) for i in indices]
    labels = inputs["labels"]
    if task == "token-classification":
        names = encoded.labels.names
        return [[names[tag] for tag in row[row != IGNORED].tolist()] for row in labels]
    if labels.ndim == 2:
        return [[int(on) for on in row] for row in labels.tolist()]
    return list(labels.tolist())


def _spans(output: Any, inputs: Mapping[str, Tensor], tokenizer: Any, longest: int = 30) -> list[str]:
    """The text of the best span: start ≤ end < start + `longest`, by the sum of both scores; "" where it is [0, 0]."""
    scores_BTT = output.start_logits.float()[:, :, None] + output.end_logits.float()[:, None, :]
    allowed = torch.ones_like(scores_BTT[0], dtype=torch.bool).triu().tril(longest - 1)
    if "attention_mask" in inputs:
        scores_BTT = scores_BTT.masked_fill(inputs["attention_mask"][:, None, :] == 0, -torch.inf)
    best_B = scores_BTT.masked_fill(~allowed, -torch.inf).flatten(1).argmax(-1)
    length = scores_BTT.shape[-1]
    texts = []
    for ids, best in zip(inputs["input_ids"], best_B.tolist(), strict=True):
        start, end = divmod(best, length)
        texts.append("" if end == 0 else tokenizer.decode(ids[start : end + 1], skip_special_tokens=True).strip())
    return texts
