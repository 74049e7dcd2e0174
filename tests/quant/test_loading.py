"""Quantising while loading, and files that pass between inlay, transformers and bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from inlay.errors import QuantizationError
from inlay.quant import FP4, NF4, Int4, Linear4, load_quantized, quantize, weight_of
from inlay.quant.base import BlockQuantization
from tiny import batch

# in_features are multiples of 64: for others the CPU kernel of bitsandbytes 0.50 takes wrong scales.
_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 |= {"pad_token_id": 0}
_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
_T5 |= {"decoder_start_token_id": 0}

MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig(**_LLAMA), AutoModelForCausalLM),
    "llama tied": (transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True), AutoModelForCausalLM),
    "gpt2": (transformers.GPT2Config(**_GPT2), AutoModelForCausalLM),
    "bert": (transformers.BertConfig(**_LLAMA, num_labels=3), AutoModelForSequenceClassification),
    "t5": (transformers.T5Config(**_T5), AutoModelForSeq2SeqLM),
}


def write(folder: Path, name: str, shard: str = "10GB", dtype: torch.dtype = torch.float32) -> Any:
    config, auto = MODELS[name]
    torch.manual_seed(0)
    auto.from_config(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return auto


def same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**batch(model)).logits
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
def test_equals_loading_first_and_quantising_then(name: str, shard: str, tmp_path: Path) -> None:
    auto = write(tmp_path, name, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    expected = quantize(auto.from_pretrained(tmp_path))
    model = load_quantized(tmp_path, auto)
    same(model, expected)
    assert not model.training
    assert model.config.quantization_config == expected.config.quantization_config
    assert torch.equal(logits(model), logits(expected))
    assert not getattr(model, "is_quantized", False)
    assert model.name_or_path == str(tmp_path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [NF4(), NF4(double_quant=False), FP4()], ids=["dq", "plain", "fp4"])
def test_our_files_load_in_transformers_and_here(name: str, config: BlockQuantization, tmp_path: Path) -> None:
    auto = write(tmp_path / "dense", name)
    ours = load_quantized(tmp_path / "dense", auto, config)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="60KB")
    again = load_quantized(tmp_path / "ours", auto)
    same(again, ours)
    again.save_pretrained(tmp_path / "again")
    same(load_quantized(tmp_path / "again", auto), ours)

    theirs = auto.from_pretrained(tmp_path / "ours")
    fours = [module for module in theirs.modules() if type(module).__name__ == "Linear4bit"]
    assert len(fours) == sum(isinstance(module, Linear4) for module in ours.modules())
    for module in fours:
        module.support_avx512bf16_for_cpu = False  # its repacking for inference rounds the scales
    torch.testing.assert_close(logits(theirs), logits(ours))  # the order of sums differs
    left, right = theirs.state_dict(), ours.state_dict()
    assert set(left) == set(right)
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_int4_loads_here_and_is_refused_by_bitsandbytes(tmp_path: Path) -> None:
    auto = write(tmp_path / "dense", next(iter(MODELS)))
    ours = load_quantized(tmp_path / "dense", auto, Int4())
    leaf = next(module for module in ours.modules() if isinstance(module, Linear4))
    steps = weight_of(leaf, torch.float32).view(-1, 64) * 7
    steps /= steps.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(steps, steps.round())
    ours.save_pretrained(tmp_path / "ours")
    same(load_quantized(tmp_path / "ours", auto), ours)
    with pytest.raises((ValueError, RuntimeError)):
        auto.from_pretrained(tmp_path / "ours")
    with pytest.raises(QuantizationError, match="stored as int4"):
        load_quantized(tmp_path / "ours", auto, NF4())


@pytest.mark.parametrize("name", MODELS)
def test_files_of_transformers_with_bitsandbytes_load_here(name: str, tmp_path: Path) -> None:
    auto = write(tmp_path / "dense", name, dtype=torch.bfloat16)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = auto.from_pretrained(tmp_path / "dense", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_quantized(tmp_path / "theirs", auto)
    packed = {key for key in theirs.state_dict() if key.endswith("quant_state.bitsandbytes__nf4")}
    assert packed == {
        f"{n}.weight.quant_state.bitsandbytes__nf4" for n, m in ours.named_modules() if type(m) is Linear4
    }
    left, right = theirs.state_dict(), ours.state_dict()
    assert set(left) == set(right)
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_dtype_and_class_are_passed_on(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    model = load_quantized(tmp_path, transformers.LlamaForCausalLM, NF4(), dtype=torch.bfloat16)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight_dtype is torch.bfloat16
    expected = quantize(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    same(model, expected)


def test_base_model_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    model = load_quantized(tmp_path, transformers.AutoModel)
    same(model, quantize(transformers.AutoModel.from_pretrained(tmp_path)))


def test_a_head_that_the_checkpoint_lacks_is_initialised_and_dense(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    model = load_quantized(tmp_path, AutoModelForSequenceClassification, num_labels=3)
    assert type(model.score) is nn.Linear
    assert model.score.weight.shape == (3, 64)
    assert torch.isfinite(model.score.weight).all()


def test_a_layer_that_the_checkpoint_lacks_is_initialised_then_packed(tmp_path: Path) -> None:
    write(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    model = load_quantized(tmp_path, AutoModelForSequenceClassification)
    layer = model.bert.encoder.layer[0].output.dense
    assert isinstance(layer, Linear4)
    assert torch.isfinite(logits(model)).all()


def test_generation_settings_come_along(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 99}))
    model = load_quantized(tmp_path)
    assert model.generation_config.eos_token_id == 99
    assert model.generate(torch.tensor([[1, 5]]), do_sample=False).shape == (1, 5)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "dense", "llama")
    load_quantized(tmp_path / "dense").save_pretrained(tmp_path / "nf4")
    with pytest.raises(QuantizationError, match="stored as nf4"):
        load_quantized(tmp_path / "nf4", config=FP4())
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match="gptq"):
        load_quantized(tmp_path / "dense")
    for file in (tmp_path / "nf4").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(QuantizationError, match=r"model\.safetensors"):
        load_quantized(tmp_path / "nf4")


def test_compute_dtype_may_be_chosen_for_a_stored_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "dense", "llama")
    load_quantized(tmp_path / "dense").save_pretrained(tmp_path / "nf4")
    model = load_quantized(tmp_path / "nf4", config=NF4(compute_dtype="bfloat16"))
    assert {m.compute_dtype for m in model.modules() if isinstance(m, Linear4)} == {torch.bfloat16}
