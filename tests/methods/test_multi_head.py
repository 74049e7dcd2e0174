"""The multi-head parallel adapter against its equation, in value and gradient; counts; where it must change nothing."""

from __future__ import annotations

import pytest
import torch
import transformers

import inlay
from attention_oracle import Extras, assert_same, features, precise, run, shake, without_adapters
from inlay.methods.base import from_spec
from tiny import FAMILIES, batch, tiny


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.proves("oracle", "multihead")
def test_equals_its_equation_in_value_and_gradient(family, scaled):
    attn = "eager" if scaled else "sdpa"
    model = tiny(family, attn=attn)
    adapter = inlay.attach(model, inlay.MultiHead(length=3, scaled=scaled), head=None)
    shake(adapter)
    precise(model, attn)
    inputs = features(model)
    tensors = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}

    def delta(site):
        p_k, p_v = (tensors[f"{site.leave}.multi_head.{n}"] for n in ("P_k", "P_v"))
        size = site.heads.key_size

        def added(q):
            q = q if scaled else q * size**0.5
            parts = []
            for i in range(site.heads.query):
                own = slice(i * size, (i + 1) * size)
                parts.append(torch.relu(q[:, i] @ p_k[:, own].T) @ p_v[:, own])
            return torch.stack(parts, dim=1)

        return added

    oracle = {s.leave: Extras(head=delta(s)) for s in adapter.sites}
    expected = run(without_adapters(model), oracle, inputs)
    assert_same(model, adapter, model(**inputs).logits, expected, inputs, tensors)


def test_the_query_is_the_one_of_the_scores_wherever_a_model_scales_it():
    """OPT scales in its projection, BERT in its attention function: in both Δ sees W_q x / sqrt(D). T5 has no scale."""
    for family, path, factor in (
        ("opt", "model.decoder.layers.0.self_attn.q_proj", 8**-0.5),
        ("bert", "bert.encoder.layer.0.attention.self.query", 8**-0.5),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q", 1.0),
    ):
        model = tiny(family)
        adapter = inlay.attach(model, inlay.MultiHead(length=2), head=None)
        projected, queries = [], []
        model.get_submodule(path).register_forward_hook(lambda m, a, out, to=projected: to.append(out))
        piece = adapter.pieces[path.rpartition(".")[0] + ".multi_head"]
        piece.register_forward_pre_hook(lambda m, args, to=queries: to.append(args[0]))
        model(**features(model))
        flat = queries[0].transpose(1, 2).flatten(2)
        torch.testing.assert_close(flat, projected[0] * factor)


@pytest.mark.proves("count", "multihead")
def test_counts_equal_those_of_a_prefix():
    """He et al.: equal parameters for equal length; with grouped heads there are more query heads than key heads."""
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.BartConfig())
    assert inlay.attach(model, inlay.MultiHead(length=200)).trained_parameters == 14_745_600
    assert inlay.attach(tiny("llama"), inlay.MultiHead(length=3)).trained_parameters == 2 * 3 * 2 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_values_leave_every_bit_at_the_start(family):
    model = tiny(family)
    inputs = features(model)
    with torch.no_grad():
        base = model(**inputs).logits
        adapter = inlay.attach(model, inlay.MultiHead(length=3, init="lora"), head=None)
        assert torch.equal(model(**inputs).logits, base)
    model(**inputs).logits.square().sum().backward()
    assert any(p.grad.any() for p in adapter.parameters())


def test_rows_of_a_mixed_batch_with_prefixes_equal_the_rows_alone():
    model = tiny("llama")
    shake(inlay.attach(model, inlay.MultiHead(length=3), name="m"), 1)
    shake(inlay.attach(model, inlay.Prefix(length=3), name="p"), 2)
    shake(inlay.attach(model, inlay.MultiHead(length=2) + inlay.Prefix(length=4) + inlay.LoRA(rank=2), name="mix"), 3)
    inputs = features(model, rows=5)
    rows = ["m", "mix", None, ("m", "p"), "p"]
    with torch.no_grad(), inlay.use(model, rows):
        mixed = model(**inputs).logits
    for i, names in enumerate(rows):
        with torch.no_grad(), inlay.use(model, names):
            torch.testing.assert_close(mixed[i], model(**inputs).logits[i], rtol=1e-4, atol=1e-5, msg=str(names))


def test_generates_with_cache_as_without_saves_and_loads(tmp_path):
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.MultiHead(length=3))
    shake(adapter)
    inputs = batch(model, padding="left", labels=False)
    cached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False))
    adapter.save(tmp_path / "a")
    other = tiny("llama")
    inlay.load(other, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(other(**features(model)).logits, model(**features(model)).logits)
    method = inlay.MultiHead(length=4, scaled=False, init="lora")
    assert from_spec(method.spec()) == method
    with pytest.raises(inlay.errors.MergeError):
        adapter.merge()


def test_learns():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.MultiHead(length=8))
    inputs = batch(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
