"""Triton's 4-bit decoding against the plain form bit for bit, and the product on packed weights, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from inlay.kernels import blocks4, triton_blocks4, triton_select
from inlay.kernels.triton_products import Tile
from inlay.quant import FP4, NF4, quantize, weight_of
from inlay.quant.base import BlockQuantization, CodeBook, QuantState
from inlay.quant.double_quant import quantize_absmax
from inlay.quant.fp4 import FP4_BOOK
from inlay.quant.nf4 import NF4_BOOK

pytestmark = pytest.mark.usefixtures("natively")

SMALL = Tile(16, 32, 64, 4, 1)


@settings(max_examples=10)
@given(
    count=st.integers(1, 700) | st.just(5001),
    block_size=st.sampled_from([32, 64, 256]),
    target=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    book=st.sampled_from([NF4_BOOK, FP4_BOOK]),
    nested=st.booleans(),
)
def test_decoded_bits(count: int, block_size: int, target: torch.dtype, book: CodeBook, nested: bool) -> None:
    torch.manual_seed(count)
    x = torch.randn(count)
    packed, absmax = blocks4.quantize(x, book, block_size, blocks4.Path.TORCH)
    state = QuantState(book, block_size, (count,), x.dtype, absmax)
    if nested:
        state = QuantState(book, block_size, (count,), x.dtype, *quantize_absmax(absmax))
    plain = blocks4.dequantize(packed, state, torch.empty(count, dtype=target), blocks4.Path.TORCH)
    ours = triton_blocks4.dequantize(packed, state, torch.full((count,), 7.0, dtype=target))
    if target is torch.bfloat16 and x.is_cpu:  # the interpreter truncates where hardware rounds
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=0)
    else:
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("nested", [False, True])
def test_decoding_on_a_gpu_takes_the_kernel(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(640)
    packed, absmax = blocks4.quantize(x, NF4_BOOK)
    scales = quantize_absmax(absmax) if nested else (absmax, None)
    state = QuantState(NF4_BOOK, 64, (640,), x.dtype, *scales)
    plain = blocks4.dequantize(packed, state, torch.empty(640), blocks4.Path.TORCH)
    monkeypatch.setattr(triton_select, "usable", lambda *tensors: True)
    monkeypatch.setattr(blocks4, "_pick", lambda path, *tensors: blocks4.Path.TORCH)
    monkeypatch.setattr(blocks4.blockwise, "dequantize_blocks", lambda *_: pytest.fail("the plain form ran"))
    assert torch.equal(blocks4.dequantize(packed, state, torch.empty(640)), plain)


def test_the_plain_form_when_it_is_forced_or_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, absmax = blocks4.quantize(torch.randn(640), NF4_BOOK)
    state = QuantState(NF4_BOOK, 64, (640,), torch.float32, absmax)
    monkeypatch.setattr(triton_blocks4, "dequantize", lambda *_: pytest.fail("the kernel ran"))
    if packed.is_cpu:
        blocks4.dequantize(packed, state, torch.empty(640))
    monkeypatch.setattr(triton_select, "usable", lambda *tensors: True)
    blocks4.dequantize(packed, state, torch.empty(640), blocks4.Path.TORCH)


@pytest.mark.parametrize("method", [NF4(), NF4(double_quant=False), FP4(block_size=128)])
@pytest.mark.parametrize("rows", [1, 19])
def test_product_on_packed_weights(method: BlockQuantization, rows: int) -> None:
    I, O, R = 128, 40, 3
    (layer,) = quantize(nn.Sequential(nn.Linear(I, O)), method)
    x, s, B = torch.randn(rows, I), torch.randn(rows, R), torch.randn(O, R)
    packed = layer.packed()
    assert triton_blocks4.fits(packed)
    plain = x @ weight_of(layer).float().mT
    torch.testing.assert_close(
        triton_blocks4.product4(x, packed, None, None, None, 1.0, SMALL), plain, rtol=1e-5, atol=1e-5
    )
    ours = triton_blocks4.product4(x, packed, layer.bias.detach(), s, B, 0.5, SMALL)
    torch.testing.assert_close(ours, plain + layer.bias.detach() + 0.5 * s @ B.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("features", "block_size", "fits"), [(128, 64, True), (96, 64, False), (128, 32, False)])
def test_which_weights_the_product_takes(features: int, block_size: int, fits: bool) -> None:
    (layer,) = quantize(nn.Sequential(nn.Linear(features, 8)), NF4(block_size=block_size))
    assert triton_blocks4.fits(layer.packed()) is fits
