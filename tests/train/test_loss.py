"""Losses against those of transformers, and by hand where it has none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from inlay.train.loss import forward, loss_of
from tiny import batch, tiny

CASES = [
    ("llama", "causal", "causal-lm"),
    ("gpt2", "causal", "causal-lm"),
    ("t5", "seq2seq", "seq2seq"),
    ("bart", "seq2seq", "seq2seq"),
    ("bert", "cls", "sequence-classification"),
    ("llama", "cls", "sequence-classification"),
    ("bert", "token", "token-classification"),
]


@pytest.mark.parametrize(("family", "head", "task"), CASES)
def test_the_mean_over_targets_is_the_loss_of_transformers(family, head, task):
    model = tiny(family, head)
    inputs = batch(model, rows=3)
    loss = loss_of(forward(model, inputs, task), inputs, task)
    theirs = model(**inputs).loss
    torch.testing.assert_close(loss.total / loss.targets, theirs, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(loss.per_row_B.sum(), loss.total.detach())
    assert loss.per_row_B.shape == (3,)
    loss.total.backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(**inputs).loss.backward()
    for mine, other in zip(ours, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(mine / loss.targets, other, atol=2e-5, rtol=1e-3)


def test_a_row_alone_has_the_loss_that_it_has_in_a_batch():
    model = tiny("llama", "causal")
    inputs = batch(model, rows=3)
    together = loss_of(forward(model, inputs, "causal-lm"), inputs, "causal-lm").per_row_B
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        part = loss_of(forward(model, alone, "causal-lm"), alone, "causal-lm")
        torch.testing.assert_close(part.total.detach(), together[row], atol=1e-5, rtol=1e-5)


def test_virtual_tokens_before_the_text_have_no_loss():
    """A prompt host puts P positions before the text; its labels belong to the text."""
    labels = torch.tensor([[5, 6, 7]])
    logits = torch.randn(1, 4 + 3, 9)
    plain = loss_of(SimpleNamespace(logits=logits[:, 4:]), {"labels": labels}, "causal-lm")
    prompted = loss_of(SimpleNamespace(logits=logits), {"labels": labels}, "causal-lm")
    assert torch.equal(plain.total, prompted.total)


def test_numbers_and_sets_of_labels_and_spans():
    logits = torch.tensor([[1.0], [3.0]])
    loss = loss_of(SimpleNamespace(logits=logits), {"labels": torch.tensor([0.0, 1.0])}, "regression")
    assert (float(loss.total), loss.targets) == (1.0 + 4.0, 2)

    logits, sets = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    loss = loss_of(SimpleNamespace(logits=logits), {"labels": sets}, "sequence-classification")
    torch.testing.assert_close(loss.total / 2, F.binary_cross_entropy_with_logits(logits, sets))
    assert int(loss.right) == int((((logits > 0) == sets.bool()).all(-1)).sum())

    model = tiny("bert", "mlm")
    from transformers import BertForQuestionAnswering

    answering = BertForQuestionAnswering(type(model.config)(**(model.config.to_dict() | {"num_labels": 2}))).eval()
    inputs = {k: v for k, v in batch(model, rows=2).items() if k != "labels"}
    inputs |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    loss = loss_of(forward(answering, inputs, "question-answering"), inputs, "question-answering")
    torch.testing.assert_close(loss.total / 2, answering(**inputs).loss)


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, -100, 2])
    loss = loss_of(SimpleNamespace(logits=logits), {"labels": labels}, "sequence-classification", smoothing=0.1)
    torch.testing.assert_close(loss.total / 3, F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert loss.per_row_B[2] == 0
