"""The plain form against bitsandbytes, bit for bit: bytes, scales, nested scales, tails, ties, zero blocks."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inlay.errors import QuantizationError
from inlay.quant.base import CodeBook
from inlay.quant.blockwise import dequantize_blocks, quantize_blocks
from inlay.quant.double_quant import dequantize_absmax, dynamic_map, quantize_absmax
from inlay.quant.fp4 import FP4, FP4_BOOK
from inlay.quant.nf4 import NF4, NF4_BOOK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOOKS = (NF4_BOOK, FP4_BOOK)


def normal(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def naive(packed: Tensor, absmax: Tensor, book: CodeBook, block_size: int, count: int) -> Tensor:
    data = packed.view(-1)
    index = torch.stack([data >> 4, data & 15], 1).view(-1).long()[:count]
    return torch.tensor(book.values)[index] * absmax.repeat_interleave(block_size)[:count]


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.name)
def test_code_books_are_those_of_bitsandbytes(book: CodeBook) -> None:
    assert torch.equal(book.table(), bnb.get_4bit_type(book.name, device="cpu"))
    ordered = torch.tensor(book.values)[list(book.order)]
    assert torch.equal(ordered, ordered.sort().values)


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@given(
    count=st.integers(1, 700) | st.sampled_from([64 * 1024, 64 * 1024 * 2 + 33]),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    dtype=st.sampled_from(DTYPES),
    book=st.sampled_from(BOOKS),
    seed=st.integers(0, 10**6),
)
def test_bytes_and_scales_are_those_of_bitsandbytes(
    count: int, block_size: int, dtype: torch.dtype, book: CodeBook, seed: int
) -> None:
    x = normal(count, seed, dtype)
    x[torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.1] = 0
    packed, absmax = quantize_blocks(x, book, block_size)
    theirs, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=book.name)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    decoded = dequantize_blocks(packed, absmax, book, block_size, torch.empty(count, dtype=dtype))
    assert torch.equal(decoded, naive(packed, absmax, book, block_size, count).to(dtype))


@given(count=st.integers(1, 1000), scale=st.sampled_from([1.0, 1e-4, 0.0]), seed=st.integers(0, 10**6))
def test_nested_scales_are_those_of_bitsandbytes(count: int, scale: float, seed: int) -> None:
    absmax = normal(count, seed).abs() * scale + 0.05
    absmax[: count // 3] = 0.05  # whole blocks at the mean, where the centred scale is zero or nearly so
    codes, nested = quantize_absmax(absmax)
    offset = absmax.mean()
    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    assert torch.equal(codes, theirs)
    assert torch.equal(nested.absmax, state.absmax)
    assert torch.equal(nested.offset, offset)
    assert torch.equal(dequantize_absmax(codes, nested), bnb.dequantize_blockwise(theirs, state) + offset)


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (3, 192), (128, 64)])
@pytest.mark.parametrize("config", [NF4(), FP4()], ids=lambda c: c.quant_type)
def test_decoded_values_are_those_of_bitsandbytes(shape: tuple[int, int], config: NF4 | FP4) -> None:
    # in_features a multiple of 64: elsewhere the CPU kernel of bitsandbytes 0.50 is wrong.
    for dtype in DTYPES:
        x = normal(shape[0] * shape[1], 1, dtype).view(shape)
        packed, absmax = quantize_blocks(x, config.book)
        theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(x, quant_type=config.quant_type))
        assert torch.equal(dequantize_blocks(packed, absmax, config.book, 64, torch.empty(shape, dtype=dtype)), theirs)


def test_a_tie_goes_to_the_lower_neighbour() -> None:
    x = torch.zeros(64)
    x[0], x[1:16] = 1.0, torch.tensor(NF4_BOOK.midpoints())
    packed, _ = quantize_blocks(x, NF4_BOOK)
    index = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    assert index[1:16].tolist() == list(range(15))


def test_a_zero_block_and_an_odd_tail() -> None:
    packed, absmax = quantize_blocks(torch.zeros(65), NF4_BOOK)
    assert packed.view(-1).tolist() == [0x77] * 33
    assert absmax.tolist() == [0.0, torch.tensor(1e-38).item()]
    assert (dequantize_blocks(packed, absmax, NF4_BOOK, 64, torch.empty(65)) == 0).all()


@given(seed=st.integers(0, 10**6))
def test_rounding_goes_to_the_nearest_value(seed: int) -> None:
    x = normal(640, seed)
    packed, absmax = quantize_blocks(x, NF4_BOOK)
    decoded = dequantize_blocks(packed, absmax, NF4_BOOK, 64, torch.empty(640))
    choices = torch.tensor(NF4_BOOK.values)[None, :] * absmax.repeat_interleave(64)[:, None]
    torch.testing.assert_close((decoded - x).abs(), (choices - x[:, None]).abs().amin(1), rtol=1e-5, atol=1e-8)


def test_bits_per_parameter() -> None:
    packed, absmax = quantize_blocks(normal(1024 * 1024, 0), NF4_BOOK)
    codes, nested = quantize_absmax(absmax)
    count = 1024 * 1024
    assert (packed.nbytes + absmax.nbytes) * 8 / count == 4.5
    assert (packed.nbytes + codes.nbytes + nested.absmax.nbytes) * 8 / count == pytest.approx(4.126953125)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 70])
def test_values_that_are_not_finite_are_refused(bad: float, at: int) -> None:
    x = torch.ones(100)
    x[at] = bad
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        quantize_blocks(x, NF4_BOOK)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(QuantizationError, match="float64"):
        quantize_blocks(torch.ones(64, dtype=torch.float64), NF4_BOOK)
