"""The loss without logits: equal to the plain one, and only where the logits are what the projection returns."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.train.loss import forward, loss_of
from inlay.train.output_head import OutputHead
from methods.oracle import randomise
from tiny import batch, tiny

METHODS = {"lora": inlay.LoRA(rank=2), "prefix": inlay.Prefix(length=2), "prompt": inlay.Prompt(length=2)}


def both(model, inputs, task, smoothing=0.0):
    head, found = OutputHead(model, task), []
    for make in (
        lambda: head.loss(inputs, smoothing),
        lambda: loss_of(forward(model, inputs, task), inputs, task, smoothing),
    ):
        model.zero_grad()
        loss = make()
        (loss.total / loss.targets).backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return head, found


@pytest.mark.parametrize(("family", "task", "method", "tied"), [
    ("llama", "causal-lm", "lora", False), ("gpt2", "causal-lm", "lora", True), ("llama", "causal-lm", "prefix", False),
    ("llama", "causal-lm", "prompt", False), ("t5", "seq2seq", "lora", True), ("bart", "seq2seq", "lora", True),
])  # fmt: skip
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_loss_on_logits(family, task, method, tied, smoothing):
    model = tiny(family, "seq2seq" if task == "seq2seq" else "causal", tie_word_embeddings=tied)
    randomise(inlay.attach(model, METHODS[method]))
    head, ((got, grads), (wanted, other)) = both(model, batch(model, rows=3), task, smoothing)
    # BART adds a bias to its logits, and those at virtual tokens are cut off.
    assert head._last is (family != "bart" and method != "prompt")
    torch.testing.assert_close(got.total, wanted.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.per_row_B, wanted.per_row_B, rtol=1e-5, atol=1e-5)
    assert (got.targets, int(got.right)) == (wanted.targets, int(wanted.right))
    assert grads.keys() == other.keys()
    mine, theirs = (torch.cat([g.flatten() for g in each.values()]) for each in (grads, other))
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()
    assert "forward" not in model.get_output_embeddings().__dict__


def test_logits_are_never_made(monkeypatch):
    model = tiny("llama", "causal")
    inlay.attach(model, inlay.LoRA(rank=2))
    head, inputs = OutputHead(model, "causal-lm"), batch(model, rows=3)
    head.loss(inputs, 0.0)
    monkeypatch.setattr("inlay.train.output_head.loss_of", lambda *_: pytest.fail("the plain loss was taken"))
    called = []
    model.lm_head.register_forward_hook(lambda *call: called.append(call[-1].shape[-1]))
    head.loss(inputs, 0.0)
    assert called == [model.config.hidden_size]


@pytest.mark.parametrize("why", ["trained", "adapted", "changed after", "hooked", "another task"])
def test_other_heads_take_the_plain_loss(why):
    model = tiny("llama", "causal", tie_word_embeddings=False)
    inlay.attach(model, inlay.LoRA(rank=2, sites=("attn.q", "lm_head") if why == "adapted" else "attn.q"))
    if why == "trained":
        model.lm_head.weight.requires_grad_()
    if why == "hooked":
        model.lm_head.register_forward_hook(lambda *_: None)
    if why == "changed after":
        final = model.forward
        model.forward = lambda **inputs: _capped(final(**inputs))
    head = OutputHead(model, "sequence-classification" if why == "another task" else "causal-lm")
    assert head.leaf is None or not head._is_last(batch(model, rows=2))


def _capped(output):
    output.logits = output.logits.tanh()
    return output


def test_the_trial_leaves_the_random_state_alone():
    model = tiny("llama", "causal").train()
    inlay.attach(model, inlay.LoRA(rank=2, dropout=0.5))
    state = torch.get_rng_state()
    OutputHead(model, "causal-lm")._is_last(batch(model))
    assert torch.equal(torch.get_rng_state(), state)
