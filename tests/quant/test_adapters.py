"""Adapters on a quantised base do what they do on the same base made dense: values, gradients, files, routes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.quant import NF4, Linear4, dequantize_model, load_quantized, quantize
from tiny import batch, tiny

METHODS: dict[str, Any] = {
    "lora": inlay.LoRA(rank=4, sites="linear"),
    "dora": inlay.DoRA(rank=4, sites="linear"),
    "adalora": inlay.AdaLoRA(),
    "ia3": inlay.IA3(),
    "bottleneck": inlay.Bottleneck(),
    "prefix": inlay.Prefix(length=3),
    "mam": inlay.MAM(),
    "unipelt": inlay.UniPELT(),
    "bitfit": inlay.BitFit(),
    "mix": inlay.LoRA(rank=2, sites="attn.q") + inlay.Bottleneck(),
}
WITH_PREFIX = ("prefix", "mam", "unipelt")  # more keys to attend to, so another output from the start
FAMILY = {"bitfit": "bert"}


def cases() -> Iterator[tuple[str, str]]:
    for method in METHODS:
        yield method, FAMILY.get(method, "llama")
        yield method, "gpt2"


def pair(family: str) -> tuple[Any, Any]:
    """A quantised model and the same function as a dense model."""
    model = quantize(tiny(family), NF4(double_quant=False))
    return model, dequantize_model(copy.deepcopy(model))


def excite(adapter: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def gradients(model: Any, adapter: Any) -> list[Tensor]:
    for parameter in adapter.parameters():
        parameter.grad = None
    example = batch(model)
    logits = model(**example).logits
    logits.square().mean().backward()
    return [parameter.grad.clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize(("method", "family"), list(cases()))
def test_values_and_gradients_are_those_on_the_dense_base(method: str, family: str) -> None:
    quantised, dense = pair(family)
    adapters = []
    for model in (quantised, dense):
        torch.manual_seed(0)
        adapters.append(inlay.attach(model, METHODS[method], name="a"))
    packed = [module for module in quantised.modules() if isinstance(module, Linear4)]
    assert packed
    for adapter in adapters:
        excite(adapter)
    example = batch(quantised)
    torch.testing.assert_close(quantised(**example).logits, dense(**example).logits, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(gradients(quantised, adapters[0]), gradients(dense, adapters[1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert all(module.weight.grad is None for module in packed)


@pytest.mark.parametrize(("method", "family"), list(cases()))
def test_attach_and_detach_leave_the_base_alone(method: str, family: str) -> None:
    model = quantize(tiny(family))
    example = batch(model)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(**example).logits
    adapter = inlay.attach(model, METHODS[method], name="a")
    assert method in WITH_PREFIX or torch.equal(model(**example).logits, logits)
    excite(adapter)
    gradients(model, adapter)
    adapter.detach()
    assert torch.equal(model(**example).logits, logits)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert {type(m) for m in model.modules() if isinstance(m, Linear4)} == {Linear4}


def test_saved_and_loaded_on_a_base_quantised_while_loading(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = load_quantized(tmp_path / "base")
    adapter = inlay.attach(model, METHODS["lora"], name="a")
    excite(adapter)
    adapter.save(tmp_path / "a")
    other = load_quantized(tmp_path / "base")
    inlay.load(other, tmp_path / "a", name="a")
    example = batch(model)
    with torch.no_grad():
        assert torch.equal(model(**example).logits, other(**example).logits)


def test_rows_with_different_adapters() -> None:
    model = quantize(tiny("llama"))
    for seed, name in enumerate(("a", "b")):
        excite(inlay.attach(model, METHODS["lora"], name=name), seed)
    example = batch(model)
    rows = example["input_ids"].shape[0]
    names = (["a", "b", None] * rows)[:rows]
    with torch.no_grad(), inlay.use(model, names):
        mixed = model(**example).logits
    for i, name in enumerate(names):
        with torch.no_grad(), inlay.use(model, name):
            torch.testing.assert_close(mixed[i], model(**example).logits[i], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_gradient_checkpointing_and_bf16() -> None:
    model = quantize(tiny("llama").bfloat16())
    adapter = inlay.attach(model, METHODS["lora"], name="a")
    excite(adapter)
    plain = gradients(model, adapter)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ours, expected in zip(gradients(model, adapter), plain, strict=True):
        assert ours.dtype is torch.float32
        assert torch.equal(ours, expected)


def test_hosted_layers_still_say_what_they_are() -> None:
    model = quantize(tiny("llama"))
    inlay.attach(model, METHODS["lora"], name="a")
    leaf = model.model.layers[0].mlp.up_proj
    assert isinstance(leaf, Linear4)
    assert isinstance(leaf, nn.Linear)
    assert type(leaf) is not Linear4
    assert inlay.quant.logical_shape(leaf) == (48, 32)
    with pytest.raises(inlay.errors.QuantizationError, match="detach"):
        quantize(model)
