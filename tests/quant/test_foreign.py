"""Bases that other libraries quantised take every method as they are: bitsandbytes in 4 and 8 bit, torchao.

The oracle is the same model with plain linears that hold what the storage decodes to.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.quant import is_quantized, weight_of
from tiny import batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # both libraries warn about kernels they lack on a CPU

METHODS: dict[str, Any] = {
    "lora": inlay.LoRA(rank=4, sites="linear"),
    "dora": inlay.DoRA(rank=4, sites="linear"),
    "adalora": inlay.AdaLoRA(),
    "ia3": inlay.IA3(),
    "bitfit": inlay.BitFit(add_missing=True),
    "bottleneck": inlay.Bottleneck(),
    "prefix": inlay.Prefix(length=3),
    "prompt": inlay.Prompt(length=3),
    "multi_head": inlay.MultiHead(),
    "mam": inlay.MAM(),
    "unipelt": inlay.UniPELT(),
    "mix": inlay.LoRA(rank=2, sites="attn.q") + inlay.Bottleneck(),
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}


def four_bit(model: nn.Module) -> None:
    for name, linear in linears(model).items():
        out, features = linear.weight.shape
        layer = bnb.nn.Linear4bit(features, out, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        model.set_submodule(name, layer.to("cpu"))


def eight_bit(model: nn.Module) -> None:
    for name, linear in linears(model).items():
        out, features = linear.weight.shape
        layer = bnb.nn.Linear8bitLt(features, out, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": linear.weight.data})
        model.set_submodule(name, layer.to("cpu"))


def torchao(config: str) -> Callable[[nn.Module], None]:
    def store(model: nn.Module) -> None:
        from torchao import quantization

        chosen = set(linears(model))
        quantization.quantize_(model, getattr(quantization, config)(), lambda _, name: name in chosen)

    return store


STORAGES: dict[str, Callable[[nn.Module], None]] = {
    "bitsandbytes-4bit": four_bit,
    "bitsandbytes-8bit": eight_bit,
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
}


def pair(storage: str) -> tuple[Any, Any]:
    """A foreign-quantised model and the same function with plain linears."""
    # 64 input features and no fewer: the 4-bit CPU kernel of bitsandbytes 0.50 takes wrong scales below a block.
    base = tiny("llama", hidden_size=64, intermediate_size=128).requires_grad_(False)
    stored, dense = copy.deepcopy(base), base
    STORAGES[storage](stored)
    for name, linear in linears(dense).items():
        module = stored.get_submodule(name)
        assert is_quantized(module)
        linear.weight = nn.Parameter(weight_of(module, torch.float32), requires_grad=False)
    return stored, dense


def trained_copy(model: Any, method: Any) -> tuple[Any, Tensor, list[Tensor]]:
    """An adapter with no value at its start, what the model says with it, and its gradients."""
    torch.manual_seed(0)
    adapter = inlay.attach(model, method, name="a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    logits = model(**batch(model)).logits
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return adapter, logits.detach(), gradients


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_as_on_the_decoded_weights(storage: str, method: str, tmp_path: Path) -> None:
    stored, dense = pair(storage)
    untouched = stored(**batch(stored)).logits.detach()
    adapter, logits, gradients = trained_copy(stored, METHODS[method])
    _, expected, expected_gradients = trained_copy(dense, METHODS[method])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert not torch.equal(logits, untouched)

    adapter.save(tmp_path / "a")
    adapter.detach()
    assert torch.equal(stored(**batch(stored)).logits, untouched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inlay.load(stored, tmp_path / "a", name="again")
    assert torch.equal(stored(**batch(stored)).logits.detach(), logits)
