"""The run itself: it changes nothing, needs no values, and works on modules that no library made."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import inlay
from architectures import CLASSES, Plain, made, tokens
from inlay.errors import SiteError
from tiny import FAMILIES, batch, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_the_run_leaves_no_trace(family):
    model = tiny(family, dropout=0.5).train()
    modules = {p: (id(m), type(m), m.training, dict(m._forward_hooks)) for p, m in model.named_modules()}
    tensors = {n: (id(t), t._version, t.requires_grad) for n, t in model.named_parameters()}
    random, attention = torch.get_rng_state(), model.config._attn_implementation
    inlay.anatomy(model)
    assert {p: (id(m), type(m), m.training, dict(m._forward_hooks)) for p, m in model.named_modules()} == modules
    assert {n: (id(t), t._version, t.requires_grad) for n, t in model.named_parameters()} == tensors
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config._attn_implementation == attention


def test_a_run_that_fails_leaves_no_trace_either():
    model = tiny("llama")
    found = inlay.anatomy(model, example={"input_ids": "no tensor"})
    assert "could not be run" in found.problem
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())
    assert inlay.anatomy(model).problem is None
    assert len(inlay.anatomy(model).select("q_proj")) == 2


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_model_on_meta_has_the_same_sites(family):
    model = tiny(family)
    with torch.device("meta"):
        empty = type(model)(model.config)
    here, there = inlay.anatomy(model), inlay.anatomy(empty)
    for name in ("attn.q", "attn", "ffn", "linear", "heads"):
        assert here.select(name) == there.select(name)
    adapter = inlay.attach(empty, inlay.LoRA(rank=2))
    assert adapter.trained_parameters == inlay.attach(model, inlay.LoRA(rank=2)).trained_parameters


def test_an_adapter_at_work_does_not_change_what_is_found():
    model = tiny("llama")
    before = str(inlay.anatomy(model))
    inlay.attach(model, inlay.LoRA(rank=2) + inlay.Bottleneck(size=2))
    inlay.attach(model, inlay.Prefix(length=2), name="other")
    inlay.use(model, ["default", "other", None])
    assert str(inlay.anatomy(tiny("llama"))) == before
    assert str(inlay.anatomy(model, example=batch(model, rows=1, labels=False))) == before


def test_a_plain_module_is_understood_from_an_example():
    model, ids = Plain(), torch.arange(6)[None]
    found = inlay.anatomy(model, example={"ids": ids})
    attention = found.blocks[1].attentions[0]
    assert attention.form == "softmax"
    assert [p.leaf for p in attention.q] == ["stack.1.look"]
    assert attention.k[0].columns == ((0, 24),)
    assert attention.v[0].columns == ((24, 48),)
    assert (attention.o, attention.pre_norm) == ("stack.1.back", "stack.1.ln_a")
    assert (found.blocks[0].ffn.up, found.blocks[0].ffn.down) == ("stack.0.wide", "stack.0.narrow")
    assert found.embed == ("words",)
    before = model(ids)
    inlay.attach(model, inlay.LoRA(rank=2) + inlay.Bottleneck(size=2), example={"ids": ids})
    assert torch.equal(model(ids), before)


def test_a_plain_module_takes_paths_without_a_run():
    adapter = inlay.attach(Plain(), inlay.LoRA(rank=2, sites=("look", "stack.*.wide")))
    assert [s.leave for s in adapter.sites] == ["stack.0.look", "stack.0.wide", "stack.1.look", "stack.1.wide"]
    with pytest.raises(SiteError, match="pass an example"):
        inlay.attach(Plain(), inlay.LoRA(sites="attn.q"))


def test_a_batch_that_comes_second():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    found = inlay.anatomy(Turned(), example={"x": torch.randn(2, 5, 8)})
    assert found.leaves["inner"].rows == "second"


def test_what_no_gradient_reaches_is_in_no_semantic_name():
    class Chooser(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList([nn.ModuleDict({"pick": nn.Linear(8, 8), "make": nn.Linear(8, 8)})])

        def forward(self, x):
            for layer in self.stack:
                x = x + layer["make"](x) * layer["pick"](x).argmax(-1, keepdim=True)
            return x

    found = inlay.anatomy(Chooser(), example={"x": torch.randn(1, 5, 8)})
    assert found.leaves["stack.0.pick"].dead
    assert [s.leave for s in found.select("linear")] == ["stack.0.make"]


@pytest.mark.parametrize("name", CLASSES)
def test_other_architectures_take_lora_and_bottlenecks_and_give_them_back(name):
    model = made(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        before = model(**tokens())[0]
    adapter = inlay.attach(model, inlay.LoRA(rank=2) + inlay.Bottleneck(size=2), head=None)
    with torch.no_grad():
        assert torch.equal(model(**tokens())[0], before)
    output = model(**tokens())[0]
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(model(**tokens())[0], before)


def test_the_printed_anatomy_folds_equal_blocks():
    text = str(inlay.anatomy(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2))))
    assert "3 blocks: transformer.h.0 ... 2" in text
    assert "q=attn.c_attn[0:16]" in text
