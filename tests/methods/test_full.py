"""Full fine-tuning and linear probing are the same as training the model itself."""

from __future__ import annotations

import copy

import pytest
import torch

import inlay
from inlay.errors import MethodError, SiteError
from methods.oracle import without_adapters
from tiny import batch, tiny

FAMILIES = [
    ("llama", "causal"), ("gpt2", "causal"), ("opt", "causal"), ("bert", "mlm"), ("bert", "cls"), ("roberta", "token"),
    ("t5", "seq2seq"), ("bart", "seq2seq"), ("modernbert", "mlm"), ("gpt_neox", "causal"), ("qwen3", "causal"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "task"), FAMILIES)
@pytest.mark.proves("count", "full")
@pytest.mark.proves("oracle", "full")
def test_trains_every_parameter_exactly_as_training_the_model_does(family, task):
    """Two steps of SGD: the same logits, tied weights included."""
    model = tiny(family, task, tie_word_embeddings=True) if task != "cls" else tiny(family, task)
    twin = copy.deepcopy(model).requires_grad_(True)
    wanted_count = sum(p.numel() for p in twin.parameters())
    adapter = inlay.attach(model, inlay.Full())
    assert adapter.trained_parameters == wanted_count
    for net, parameters in ((model, adapter.parameters()), (twin, twin.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for seed in (0, 1):
            net(**batch(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    inputs = batch(model, labels=False) if task != "seq2seq" else batch(model)
    with torch.no_grad():
        wanted, got = twin(**inputs).logits, model(**inputs).logits
        base = without_adapters(model)(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - base).abs().max() > 1e-3


def test_output_is_unchanged_at_the_start_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        inputs = batch(model, labels=False)
        with torch.no_grad():
            before = model(**inputs).logits
            adapter = inlay.attach(model, inlay.Full())
            after = model(**inputs).logits
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_some_sites_of_a_bf16_model():
    """An embedding copy in fp32 must not change the dtype of what follows."""
    model = tiny("bert", dtype=torch.bfloat16)
    adapter = inlay.attach(model, inlay.Full(sites=("embed", "norm")))
    loss = model(**batch(model)).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_chosen_sites_alone_are_trained():
    model = tiny("bert", "mlm")
    adapter = inlay.attach(model, inlay.Full(sites="norm"))
    assert adapter.trained_parameters == 2 * 32 * (2 * 2 + 2), "two a block, the embeddings' and the output head's"
    assert inlay.attach(tiny("bert", "mlm"), inlay.Full(sites="ffn.up", layers=(0,))).trained_parameters == 33 * 48
    with pytest.raises(MethodError, match="whole modules"):
        inlay.attach(tiny("gpt2"), inlay.Full(sites="attn.q"))


def test_head_only_trains_the_head_and_is_refused_where_there_is_none():
    adapter = inlay.attach(tiny("bert"), inlay.HeadOnly())
    assert adapter.trained_parameters == 32 * 3 + 3
    assert [s.leave for s in adapter.sites] == ["classifier"]
    head = inlay.attach(tiny("roberta"), inlay.HeadOnly())
    assert head.trained_parameters == 32 * 32 + 32 + 32 * 3 + 3
    with pytest.raises((MethodError, SiteError)):
        inlay.attach(tiny("llama"), inlay.HeadOnly())


@pytest.mark.proves("oracle", "headonly")
@pytest.mark.parametrize(("family", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("llama", "score")])
def test_head_only_is_training_the_head_of_a_frozen_model(family, head):
    """Two steps of SGD on the model's own head, everything else frozen: the same logits."""
    model = tiny(family, "cls")
    twin = copy.deepcopy(model).requires_grad_(False)
    own = list(twin.get_submodule(head).requires_grad_(True).parameters())
    adapter = inlay.attach(model, inlay.HeadOnly())
    for net, parameters in ((model, adapter.parameters()), (twin, own)):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for seed in (0, 1):
            net(**batch(model, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        wanted, got = (net(**batch(model, labels=False)).logits for net in (twin, model))
        base = without_adapters(model)(**batch(model, labels=False)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - base).abs().max() > 1e-2


def test_a_quantised_module_is_refused():
    from inlay.quant.model import quantize

    model = tiny("llama", hidden_size=64, intermediate_size=128)
    quantize(model)
    with pytest.raises(MethodError, match="quantised"):
        inlay.attach(model, inlay.Full())
    assert not any("inlay" in n for n, _ in model.named_modules())


def test_two_copies_on_rows_of_one_batch():
    model = tiny("bert")
    outputs = {}
    for name, seed in (("a", 1), ("b", 2)):
        adapter = inlay.attach(model, inlay.Full(sites=("attn.q", "norm")), name=name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    inputs = batch(model, rows=4, labels=False)
    with torch.no_grad():
        for name in ("a", "b", None):
            inlay.use(model, name)
            outputs[name] = model(**inputs).logits
        inlay.use(model, ["b", None, "a", "b"])
        mixed = model(**inputs).logits
    for row, name in enumerate(("b", None, "a", "b")):
        torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs["a"], outputs["b"], atol=1e-2)


def test_tensors_beside_the_modules_are_named():
    """A class token belongs to no leaf; it stays frozen, and the user hears of it."""

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Parameter(torch.zeros(1, 1, 8))
            self.project = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.project(torch.cat([self.first.expand(len(x), -1, -1), x], 1))

    with pytest.warns(UserWarning, match=r"leaves 8 parameters frozen.*the largest first"):
        adapter = inlay.attach(Tokens(), inlay.Full(), example={"x": torch.randn(2, 3, 8)})
    assert adapter.trained_parameters == 72
