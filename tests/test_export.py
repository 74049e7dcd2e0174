"""Merged checkpoints: plain transformers loads them and computes the same; what cannot be verified is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import inlay
from comparing import bits, logits, randomise, same_bits
from inlay.errors import AdapterError, MergeError
from inlay.export import export_merged
from inlay.quant.model import quantize
from tiny import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart", "gpt_neox"])
def test_plain_transformers_loads_it_and_computes_the_same(family, tmp_path):
    model = tiny(family)
    sites = ("linear", "embed") if family in ("bert", "llama", "gpt_neox") else ("linear", "embed", "lm_head")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites=sites) + inlay.IA3()))
    y, before, config = logits(model), bits(model), dict(model.config.__dict__)
    export_merged(model, tmp_path / "out")
    assert not adapter.merged
    assert same_bits(model, before)
    assert torch.equal(logits(model), y)
    assert model.config.__dict__ == config
    again = type(model).base if hasattr(type(model), "base") else type(model)
    again = again.from_pretrained(tmp_path / "out").eval()
    assert not any("inlay" in n for n in load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(logits(again), y, atol=1e-5, rtol=1e-5)


def test_only_the_named_adapters_are_exported(tmp_path):
    model = tiny("llama")
    randomise(inlay.attach(model, inlay.LoRA(rank=2), name="a"), 1)
    b = randomise(inlay.attach(model, inlay.LoRA(rank=2), name="b"), 2)
    with inlay.use(model, "a"):
        y = logits(model)
    inlay.use(model, ["a", "b", None])
    with pytest.raises(AdapterError, match="which to export"):
        export_merged(model, tmp_path / "out")
    export_merged(model, tmp_path / "out", "a")
    torch.testing.assert_close(logits(tiny("llama").from_pretrained(tmp_path / "out")), y, atol=1e-5, rtol=1e-5)
    assert [g.names for g in inlay.state.state_of(model).groups] == [("a",), ("b",), ()]
    b.merge()
    with pytest.raises(MergeError, match="merged into the weights too"):
        export_merged(model, tmp_path / "other", "a")
    with pytest.raises(MergeError, match="not empty"):
        export_merged(model, tmp_path / "out", ("b", "a"))


def test_what_is_not_linear_leaves_no_folder(tmp_path):
    model = tiny("llama")
    inlay.attach(model, inlay.LoRA(rank=2) + inlay.Bottleneck(size=4))
    with pytest.raises(MergeError, match="BottleneckDelta"):
        export_merged(model, tmp_path / "out")
    adapter = inlay.adapters(model)["default"]
    adapter.merge(parts="linear")
    with pytest.raises(MergeError, match="only the linear part"):
        export_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_the_architecture_has_no_place_for_is_noticed_on_reload(tmp_path):
    model = tiny("llama")
    randomise(inlay.attach(model, inlay.BitFit(sites="attn.q", add_missing=True)))
    with pytest.raises(MergeError, match=r"q_proj\.bias is not loaded again"):
        export_merged(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantised_model_is_written_dense(family, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64} if family == "llama" else {"n_embd": 64, "n_inner": 64}
    model = quantize(tiny(family, **sizes))
    randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")))
    y, before = logits(model), bits(model)
    with pytest.raises(MergeError, match='to="bf16"'):
        export_merged(model, tmp_path / "out")
    export_merged(model, tmp_path / "out", to="fp32")
    assert torch.equal(logits(model), y)
    assert same_bits(model, before)
    assert hasattr(model.config, "quantization_config")
    assert "quantization_config" not in json.loads(Path(tmp_path / "out" / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), y, atol=1e-4, rtol=1e-4)
    export_merged(model, tmp_path / "half", to="bf16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
