"""Decoding of outputs, spans, generation, and the size of a step in memory."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from inlay.errors import DataError
from inlay.train.evaluate import Evaluator, decode
from inlay.train.generate import Decoding, generate
from inlay.train.loop import EvaluationStopped
from inlay.train.signals import StopRequest
from tiny import batch, tiny
from train.worlds import tokenizer

WORDS = SimpleNamespace(decode=lambda ids, **_: " ".join(str(int(i)) for i in ids))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ([0, 9, 0, 0, 0], [0, 0, 0, 9, 0], "11 12 13"),
        ([0, 0, 0, 9, 0], [0, 9, 0, 8, 0], "13"),  # the end never lies before the start
        ([9, 0, 0, 0, 0], [9, 0, 0, 0, 0], ""),  # [0, 0] stands for "no answer"
        ([0, 0, 0, 0, 9], [0, 0, 0, 0, 9], "11"),  # padding is never part of an answer
    ],
)
def test_the_best_span(start, end, expected):
    output = SimpleNamespace(start_logits=torch.tensor([start]).float(), end_logits=torch.tensor([end]).float())
    inputs = {"input_ids": torch.tensor([[10, 11, 12, 13, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    if expected == "11":
        output.start_logits[0, 1] = output.end_logits[0, 1] = 1
    assert decode(output, inputs, "question-answering", None, [0], WORDS) == [expected]


def test_tags_are_those_of_the_labelled_tokens():
    logits = torch.zeros(1, 4, 2)
    logits[0, 1, 1] = logits[0, 3, 1] = 5
    inputs = {"labels": torch.tensor([[-100, 0, 0, -100]])}
    encoded = SimpleNamespace(labels=SimpleNamespace(names=["O", "B-x"]))
    assert decode(SimpleNamespace(logits=logits), inputs, "token-classification", encoded, [0], None) == [["B-x", "O"]]


class Rows:
    """Batches of one set, each row by itself or all together."""

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        self.inputs, self.size = batch(model, rows=6), size

    def epoch(self, n: int) -> list[SimpleNamespace]:
        found = []
        for at in range(0, 6, self.size):
            inputs = {k: v[at : at + self.size] for k, v in self.inputs.items()}
            found.append(SimpleNamespace(inputs=inputs, indices=list(range(at, min(6, at + self.size)))))
        return found


@pytest.mark.parametrize(
    ("family", "head", "task"), [("llama", "causal", "causal-lm"), ("bert", "cls", "sequence-classification")]
)
def test_the_size_of_batches_does_not_change_what_is_measured(family, head, task):
    model = tiny(family, head)
    encoded = SimpleNamespace(labels=SimpleNamespace(names=["a", "b", "c"], several=False))
    measured = []
    for size in (1, 4, 6):
        evaluator = Evaluator(model, {"eval": encoded}, lambda _, size=size: Rows(model, size), task, None, nullcontext)
        before = torch.get_rng_state()
        measured.append(evaluator(0)["eval"])
        assert torch.equal(torch.get_rng_state(), before)
    for other in measured[1:]:
        assert other == pytest.approx(measured[0], abs=1e-5, rel=1e-5)


def test_a_signal_ends_an_evaluation_between_batches():
    model, stop = tiny("llama", "causal"), StopRequest()
    stop.signum = 15
    evaluator = Evaluator(model, {"eval": None}, lambda _: Rows(model, 2), "causal-lm", None, nullcontext, stop=stop)
    with pytest.raises(EvaluationStopped):
        evaluator(1)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_text_does_not_depend_on_its_batch(family):
    model, words = tiny(family), tokenizer(family)
    prompts = [words(text)["input_ids"] for text in ("a red cat", "the blue fish is on a tree", "dog")]
    decoding = Decoding(max_new_tokens=5)
    alone = [dict(generate(model, words, [p], decoding, autocast=nullcontext))[0] for p in prompts]
    together = dict(generate(model, words, prompts, decoding, batch=3, autocast=nullcontext))
    assert [together[i] for i in range(3)] == alone


def test_prompts_that_leave_no_room_are_refused():
    model, words = tiny("llama"), tokenizer("llama")
    limit = model.config.max_position_embeddings
    with pytest.raises(DataError, match=f"prompt 1 has {limit} tokens; the model has {limit} positions"):
        list(generate(model, words, [[7] * limit], Decoding(), autocast=nullcontext))
    with pytest.raises(DataError, match="prompt 2 is empty"):
        list(generate(model, words, [[7], []], Decoding(), autocast=nullcontext))
    near = list(generate(model, words, [[7] * (limit - 2)], Decoding(max_new_tokens=50), autocast=nullcontext))
    assert len(near) == 1
