"""P-tuning v2: published counts, the head, tagging and classification, dropout, storing."""

from __future__ import annotations

import pytest
import torch
import transformers

import inlay
from attention_oracle import features
from inlay.methods.base import from_spec
from tiny import LABELS, batch, tiny


@pytest.mark.parametrize(("length", "count"), [(8, 393_216), (20, 983_040), (128, 6_291_456)])
@pytest.mark.proves("count", "ptuningv2")
def test_counts_on_bert_large(length, count):
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    adapter = inlay.attach(model, inlay.PTuningV2(length=length))
    assert adapter.head_parameters == 2_050
    assert adapter.trained_parameters == adapter.stored_parameters == count + 2_050


def test_starts_as_published_and_the_mlp_is_an_option():
    assert inlay.PTuningV2().mid is None
    adapter = inlay.attach(tiny("bert", hidden_size=64), inlay.PTuningV2(length=60), head=None)
    values = torch.cat([p.flatten() for p in adapter.parameters()])
    assert abs(values.std().item() - 1) < 0.05
    mlp = inlay.attach(tiny("bert"), inlay.PTuningV2(length=4, mid=6), head=None)
    assert mlp.trained_parameters == 4 * 32 + 32 * 6 + 6 + 2 * (6 + 1) * 64
    assert mlp.stored_parameters == 2 * 2 * 4 * 32
    method = inlay.PTuningV2(length=3, mid=5, dropout=0.2)
    assert from_spec(method.spec()) == method
    assert "2110.07602" in inlay.citation(method)


@pytest.mark.proves("oracle", "ptuningv2")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_is_the_function_of_a_prefix_in_value_and_gradient(family):
    """Which is held to He et al.'s equation 7 in test_prefix.py; only the start, dropout and the head differ."""
    model = tiny(family, "cls")
    deep = inlay.attach(model, inlay.PTuningV2(length=3), name="deep", head=None)
    prefix = inlay.attach(model, inlay.Prefix(length=3), name="prefix", head=None)
    prefix.load_state_dict({n.replace("p_tuning_v2", "prefix"): t.clone() for n, t in deep.state_dict().items()})
    found = {}
    for adapter in (deep, prefix):
        with inlay.use(model, adapter.name):
            logits = model(**features(model)).logits
            logits.square().sum().backward()
        found[adapter.name] = [logits.detach(), *(p.grad for p in adapter.parameters())]
    for ours, wanted in zip(found["deep"], found["prefix"], strict=True):
        assert wanted.any()
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "modernbert"])
@pytest.mark.parametrize("task", ["cls", "token"])
def test_learns_with_a_linear_head_and_loads_back(family, task, tmp_path):
    model = tiny(family, task)
    adapter = inlay.attach(model, inlay.PTuningV2(length=4))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".inlay." in n for n in trained)
    assert any(".head." in n for n in trained)
    assert not any("pooler" in n for n in trained)
    inputs = batch(model, rows=6)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    model.train()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    tokens = inputs["input_ids"].shape[1]
    assert out.logits.shape == ((6, LABELS) if task == "cls" else (6, tokens, LABELS))
    model.eval()
    adapter.save(tmp_path / "a")
    other = tiny(family, task)
    inlay.load(other, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(other(**features(model)).logits, model(**features(model)).logits)


def test_dropout_acts_on_the_prefix_in_training_only():
    model = tiny("bert")
    adapter = inlay.attach(model, inlay.PTuningV2(length=50))
    piece = adapter.pieces["bert.encoder.layer.0.attention.self.p_tuning_v2"]
    x = torch.zeros(3, 2, 32)
    model.train()
    share = (piece(x)[1] == 0).float().mean().item()
    assert 0.07 < share < 0.13
    model.eval()
    assert (piece(x)[1] != 0).all()
