"""`quantize` on whole models: what is chosen, what stays, what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from inlay.errors import QuantizationError
from inlay.quant import FP4, NF4, Linear4, dequantize_model, is_quantized, logical_shape, quantize, weight_of
from tiny import CASES, batch, tiny


def layers(model: nn.Module) -> dict[str, Linear4]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4)}


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_family_computes_with_the_decoded_weights(family: str, task: str) -> None:
    model = tiny(family, task)  # type: ignore[arg-type]
    reference = copy.deepcopy(model)
    assert quantize(model, NF4(double_quant=False)) is model
    chosen = layers(model)
    assert chosen
    for name, layer in chosen.items():
        leaf = reference.get_submodule(name)
        decoded = weight_of(layer)
        assert logical_shape(leaf) == logical_shape(layer)
        assert (decoded - weight_of(leaf)).abs().max() <= 0.16 * weight_of(leaf).abs().max()
        leaf.weight.data = decoded.t().contiguous() if isinstance(leaf, Conv1D) else decoded
    example = batch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**example).logits, reference(**example).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_heads_and_embeddings_stay_dense(family: str, task: str) -> None:
    model = quantize(tiny(family, task))  # type: ignore[arg-type]
    head = model.get_output_embeddings()
    assert head is None or not is_quantized(head)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.startswith(("score", "classifier", "classification_head")):
            assert all(parameter.is_floating_point() for parameter in module.parameters())
    skipped = model.config.quantization_config["llm_int8_skip_modules"]
    dense = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    keep = getattr(model, "_keep_in_fp32_modules", None) or []
    assert set(skipped) == {name for name in dense if not any(name.endswith(k) for k in keep)}


def test_conv1d_becomes_a_linear_on_the_transposed_weight() -> None:
    model = tiny("gpt2")
    leaf = model.transformer.h[0].attn.c_attn
    dense = weight_of(leaf).clone()
    quantize(model)
    assert type(leaf) is Linear4
    assert (leaf.out_features, leaf.in_features) == (96, 32) == tuple(weight_of(leaf).shape)
    assert not hasattr(leaf, "nf")
    assert (weight_of(leaf) - dense).norm() < 0.12 * dense.norm()


def test_skip_names_exactly_what_stays_dense() -> None:
    model = quantize(tiny("llama"), NF4(skip=("lm_head", "down_proj", "model.layers.1")))
    assert set(layers(model)) == {
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    }
    assert "lm_head" in layers(quantize(tiny("llama"), NF4(skip=())))


def test_skip_that_matches_nothing_names_the_nearest() -> None:
    model = tiny("llama")
    with pytest.raises(QuantizationError, match=r"down_prj.*down_proj"):
        quantize(model, NF4(skip=("model.layers.0.mlp.down_prj",)))
    assert not layers(model)


def test_a_tied_head_is_refused_when_asked_for() -> None:
    model = tiny("gpt2")
    with pytest.raises(QuantizationError, match="tied to an embedding"):
        quantize(model, NF4(skip=()))
    assert not layers(model)


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="nothing to quantise"):
        quantize(nn.Sequential(nn.LayerNorm(4)))


def test_quantising_twice_changes_nothing() -> None:
    model = quantize(tiny("llama"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantize(model, FP4())
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_weights_that_cannot_be_quantised_leave_the_model_alone() -> None:
    with pytest.raises(QuantizationError, match="meta device; use load_quantized"):
        quantize(tiny("llama").to("meta"))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double())
    with pytest.raises(QuantizationError, match=r"^1 holds torch.float64"):
        quantize(model)
    assert not layers(model)
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"^0: .*NaN"):
        quantize(model)


def test_adapters_come_after_quantising() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.add_module("inlay", nn.Module())
    with pytest.raises(QuantizationError, match="before adapters are attached"):
        quantize(model)


def test_storage_that_the_bytes_do_not_fill_is_refused() -> None:
    with pytest.raises(QuantizationError, match="do not fill"):
        quantize(nn.Sequential(nn.Linear(3, 2)), NF4(storage="float32"))


def test_large_dense_rest_is_reported() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 64, 64))

    with pytest.warns(UserWarning, match=r"stay dense .*1\.up \(Experts\)"):
        quantize(nn.Sequential(nn.Linear(64, 64), Experts()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(nn.Sequential(nn.Linear(64, 64), nn.Embedding(1000, 64), nn.LayerNorm(64)))


def test_dequantize_model_keeps_the_function() -> None:
    for family in ("llama", "gpt2"):
        model = quantize(tiny(family))
        example = batch(model)
        expected = model(**example).logits
        assert dequantize_model(model) is model
        assert not layers(model)
        assert not hasattr(model.config, "quantization_config")
        torch.testing.assert_close(model(**example).logits, expected)
        assert dequantize_model(quantize(tiny(family)), torch.bfloat16) is not None


def test_dequantize_model_refuses_what_carries_something() -> None:
    class Hosted(Linear4):
        pass

    model = quantize(nn.Sequential(nn.Linear(64, 64)))
    model[0].__class__ = Hosted
    with pytest.raises(QuantizationError, match="detach"):
        dequantize_model(model)


@pytest.mark.parametrize("config", [NF4(), FP4(block_size=128, compute_dtype=torch.bfloat16, skip=("a",))])
def test_config_survives_json_and_refuses_unknown_keys(config: NF4 | FP4) -> None:
    assert type(config).model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="blocksize"):
        NF4(blocksize=64)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="block_size"):
        NF4(block_size=65)
