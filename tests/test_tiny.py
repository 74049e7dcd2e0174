"""The models and batches that other tests stand on are what they claim to be."""

from __future__ import annotations

import pytest
import torch

from tiny import CASES, FAMILIES, batch, tiny


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_case_has_a_loss_and_a_gradient_for_every_parameter(family, task):
    model = tiny(family, task)
    model(**batch(model)).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Key biases add the same to every score of a softmax, so their exact gradient is zero (rounding aside).
    assert not without, without


@pytest.mark.parametrize("family", FAMILIES)
def test_same_arguments_same_model_and_the_global_rng_stays(family):
    state = torch.get_rng_state()
    one, two, other = tiny(family), tiny(family), tiny(family, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    inputs = batch(one)
    with torch.no_grad():
        assert torch.equal(one(**inputs).logits, two(**inputs).logits)
        assert not torch.equal(one(**inputs).logits, other(**inputs).logits)
    assert all(p.std() > 0.01 and p.ne(0).all() for p in one.parameters() if p.ndim == 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_in_train_mode_only_when_asked_for(family):
    for dropout, same in ((0.0, True), (0.5, False)):
        model = tiny(family, dropout=dropout).train()
        inputs = batch(model)
        torch.manual_seed(0)
        assert torch.equal(model(**inputs).logits, model(**inputs).logits) is same


@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_batch_pads_where_asked_and_never_trains_on_padding(padding):
    model = tiny("llama")
    made = batch(model, rows=4, length=8, padding=padding)
    mask = made["attention_mask"]
    assert (made["labels"] != -100).eq(mask.bool()).all()
    assert (made["input_ids"] == model.config.pad_token_id).eq(~mask.bool()).all()
    assert mask.sum(1).tolist() == ([8] * 4 if padding == "none" else [8, 6, 4, 8])
    if padding != "none":
        assert mask[1, -1] == (padding == "left")
