"""Storing another weight in a quantised leaf, taking it back, and the damage that is reported."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from inlay.errors import QuantizationError
from inlay.quant import FP4, NF4, damage, quantize, requantise, restore, weight_of

OUT, IN = 64, 128


def ours(weight: Tensor) -> nn.Module:
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data = weight.clone()
    return quantize(nn.Sequential(layer))[0]


def ours_plain_fp4(weight: Tensor) -> nn.Module:
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data = weight.clone()
    return quantize(nn.Sequential(layer), FP4(double_quant=False, block_size=128, storage="bfloat16"))[0]


def bnb4(weight: Tensor) -> nn.Module:
    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, module=layer)
    return layer.to("cpu")


def bnb8(weight: Tensor) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight.clone()})
    return layer.to("cpu")


LEAVES = [ours, ours_plain_fp4, bnb4, bnb8]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("make", LEAVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("forward_first", [False, True])
def test_replaced_and_restored(make: Callable[[Tensor], nn.Module], forward_first: bool) -> None:
    base = torch.randn(OUT, IN)
    leaf, x = make(base), torch.randn(3, IN)
    if forward_first:
        leaf(x)
    before, other = weight_of(leaf), torch.randn(OUT, IN)
    stored = requantise(leaf, other)
    fresh = make(other)
    assert torch.equal(weight_of(leaf), weight_of(fresh))
    assert torch.equal(leaf(x), fresh(x))
    assert not leaf.weight.requires_grad
    restore(leaf, stored)
    assert torch.equal(weight_of(leaf), before)
    assert torch.equal(leaf(x), make(base)(x))


def test_damage_of_a_small_update_is_about_its_own_size() -> None:
    base, delta = torch.randn(256, 256), torch.randn(256, 4) @ torch.randn(4, 256)
    delta *= 0.03 * base.norm() / delta.norm()
    leaf = quantize(nn.Sequential(nn.Linear(256, 256, bias=False)), NF4())[0]
    requantise(leaf, base)
    dense = weight_of(leaf)
    requantise(leaf, dense + delta)
    assert 0.8 < damage(dense, delta, weight_of(leaf)) < 1.4
    assert damage(dense, delta, dense + delta) < 1e-6
    assert damage(dense, delta, dense) == pytest.approx(1)
    assert damage(dense, torch.zeros_like(dense), dense) == 0


@pytest.mark.parametrize("make", LEAVES, ids=lambda f: f.__name__)
def test_bad_weights_are_refused_and_change_nothing(make: Callable[[Tensor], nn.Module]) -> None:
    leaf = make(torch.randn(OUT, IN))
    before = weight_of(leaf)
    with pytest.raises(QuantizationError, match="shape"):
        requantise(leaf, torch.randn(IN, OUT))
    with pytest.raises(QuantizationError, match="NaN"):
        requantise(leaf, torch.full((OUT, IN), float("nan")))
    assert torch.equal(weight_of(leaf), before)


def test_a_dense_leaf_is_refused() -> None:
    with pytest.raises(QuantizationError, match="dense copy"):
        requantise(nn.Linear(IN, OUT), torch.randn(OUT, IN))
