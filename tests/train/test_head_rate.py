"""The learning rate that a new task head starts from: by the size of what enters it."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.train.head_rate import LARGEST, head_learning_rate, head_parameters
from inlay.train.optim import parameter_groups
from tiny import batch, tiny
from train.engine import config


def entering(model, path, inputs):
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_one_step_moves_a_logit_by_one(family):
    """AdamW's first step moves each weight by the rate, here in the direction of sign(x)."""
    model = tiny(family, "cls")
    inputs = batch(model)
    (path, *_) = dict.fromkeys(site.leave for site in inlay.anatomy(model).select("head"))
    rate = head_learning_rate(model, [path], inputs)
    x = entering(model, path, inputs)
    assert rate is not None
    assert float(rate * x.abs().sum(-1).mean()) == pytest.approx(1, rel=0.06) or rate == LARGEST


def test_adapters_weights_and_modes_do_not_change_it_and_are_left_alone():
    model = tiny("bert", "cls")
    inputs = batch(model)
    alone = head_learning_rate(model, ["classifier"], inputs)
    adapter = inlay.attach(model, inlay.Prefix(length=4, std=3.0))
    model.train()
    state = torch.get_rng_state()
    assert head_learning_rate(model, ["classifier"], inputs) == alone
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert inlay.adapters(model)[adapter.name] is adapter
    assert not model.classifier._forward_pre_hooks


def test_a_head_that_a_checkpoint_had_and_a_model_without_one_give_none():
    assert head_learning_rate(tiny("bert", "cls"), [], {}) is None
    assert head_learning_rate(tiny("llama", "causal"), ["lm_head"], {}) is None


@pytest.mark.parametrize("method", [inlay.LoRA(rank=2), inlay.Full(), inlay.HeadOnly(), inlay.BitFit()], ids=repr)
def test_the_head_has_its_own_rate_whoever_trains_it(method):
    model = tiny("bert", "cls")
    adapter = inlay.attach(model, method)
    head = {id(p) for p in head_parameters(adapter)}
    assert sum(p.numel() for p in adapter.parameters() if id(p) in head) == sum(
        p.numel() for p in model.classifier.parameters(recurse=False)
    )
    groups = parameter_groups(adapter, config(learning_rate=1e-3, head_learning_rate=0.25))
    for group in groups:
        assert {id(p) in head for p in group["params"]} == {group["lr"] == 0.25}
