"""Weights and shapes read back from every storage: dense, Conv1D, embedding, bitsandbytes, torchao."""

from __future__ import annotations

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay.errors import QuantizationError
from inlay.quant import is_quantized, logical_shape, weight_of

OUT, IN = 64, 128


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bnb_linear4(weight: Tensor, quant_type: str = "nf4", double_quant: bool = True) -> bnb.nn.Linear4bit:
    out, features = weight.shape
    layer = bnb.nn.Linear4bit(features, out, bias=False, quant_type=quant_type, compress_statistics=double_quant)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_type, compress_statistics=double_quant, module=layer
    )
    return layer.to("cpu")


def bnb_linear8(weight: Tensor) -> bnb.nn.Linear8bitLt:
    out, features = weight.shape
    layer = bnb.nn.Linear8bitLt(features, out, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


def test_dense_layouts_are_out_by_in() -> None:
    linear, conv, embedding = nn.Linear(IN, OUT), Conv1D(OUT, IN), nn.Embedding(IN, OUT)
    x = normal(3, IN)
    torch.testing.assert_close(conv(x), x @ weight_of(conv).t() + conv.bias)
    assert torch.equal(weight_of(linear), linear.weight)
    assert torch.equal(weight_of(embedding)[:, 5], embedding(torch.tensor(5)))
    for module in (linear, conv, embedding):
        assert logical_shape(module) == (OUT, IN) == tuple(weight_of(module).shape)
        assert not weight_of(module).requires_grad
        assert not is_quantized(module)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_4bit(quant_type: str, double_quant: bool) -> None:
    layer = bnb_linear4(normal(OUT, IN), quant_type, double_quant)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(weight_of(layer), expected)
    assert logical_shape(layer) == (OUT, IN)
    assert is_quantized(layer)


def test_bitsandbytes_4bit_where_its_own_cpu_kernel_is_wrong() -> None:
    # in_features of 16, 32, 48 modulo 64: the CPU kernel of bitsandbytes 0.50 takes the wrong block's scale.
    weight = normal(16, 48) * torch.logspace(-3, 3, 16)[:, None]
    layer = bnb_linear4(weight, double_quant=False)
    block_max = weight.view(-1, 64).abs().amax(1).repeat_interleave(64).view(16, 48)
    assert ((weight_of(layer) - weight).abs() <= 0.16 * block_max).all()


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 only")
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_4bit_after_its_eval_forward_repacked_it(double_quant: bool) -> None:
    layer = bnb_linear4(normal(OUT, IN), double_quant=double_quant).eval()
    before = weight_of(layer)
    with torch.no_grad():
        layer(normal(1, IN).bfloat16())
    assert layer.weight.quant_state.packing_format_for_cpu
    for _ in range(2):  # reading must not change the layer
        torch.testing.assert_close(weight_of(layer), before, rtol=2**-8, atol=0)
    assert layer.weight.quant_state.packing_format_for_cpu


def test_bitsandbytes_8bit_before_and_after_its_first_forward() -> None:
    weight = normal(OUT, IN)
    layer = bnb_linear8(weight)
    before = weight_of(layer)
    assert (before - weight).abs().max() <= weight.abs().max() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes casts the input and says so
        layer(normal(2, IN))
    assert layer.weight.SCB is None
    assert torch.equal(weight_of(layer), before)
    assert torch.equal(before, bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB))
    assert is_quantized(layer)
    assert logical_shape(layer) == (OUT, IN)


@pytest.mark.filterwarnings("ignore")
def test_torchao() -> None:
    from torchao import quantization

    for config in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"):
        model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).requires_grad_(False)
        dense = model[0].weight.clone()
        quantization.quantize_(model, getattr(quantization, config)())
        assert is_quantized(model[0])
        assert logical_shape(model[0]) == (OUT, IN)
        x = normal(3, IN)
        torch.testing.assert_close(model(x), x @ weight_of(model[0]).t())
        torch.testing.assert_close(weight_of(model[0]), dense, rtol=0.1, atol=1e-3)


def test_dtype_rounds_once() -> None:
    layer = bnb_linear4(normal(OUT, IN))
    assert torch.equal(weight_of(layer, torch.bfloat16), weight_of(layer).bfloat16())
    assert weight_of(nn.Linear(4, 4), torch.float16).dtype is torch.float16


def test_unknown_storages_are_refused() -> None:
    layer = nn.Linear(IN, OUT, bias=False)
    foreign = copy.deepcopy(layer)
    foreign.weight = nn.Parameter(torch.zeros(OUT, IN // 8, dtype=torch.int32), requires_grad=False)
    with pytest.raises(QuantizationError, match="int32"):
        weight_of(foreign)
    sharded = copy.deepcopy(layer)
    sharded.weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(QuantizationError, match="sharded"):
        weight_of(sharded)
    with pytest.raises(QuantizationError, match="meta"):
        weight_of(layer.to("meta"))
    assert logical_shape(layer) == (OUT, IN)
    with pytest.raises(QuantizationError, match="LayerNorm"):
        logical_shape(nn.LayerNorm(4))
    with pytest.raises(QuantizationError, match="no weight"):
        weight_of(nn.ReLU())
