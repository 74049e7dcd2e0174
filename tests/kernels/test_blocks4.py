"""The C forms against the plain form, bit for bit, and what happens where there is no compiler."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.errors import QuantizationError
from inlay.kernels import blocks4, compiled
from inlay.kernels.blocks4 import Path
from inlay.quant.base import CodeBook, QuantState
from inlay.quant.double_quant import quantize_absmax
from inlay.quant.fp4 import FP4_BOOK
from inlay.quant.nf4 import NF4_BOOK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [path for path in Path if path is not Path.TORCH and path <= blocks4.best_path()]

pytestmark = pytest.mark.skipif(not FORMS, reason="no C compiler")


@given(
    count=st.integers(1, 900) | st.just(64 * 5000 + 7),
    block_size=st.sampled_from([32, 64, 256, 4096]),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    book=st.sampled_from([NF4_BOOK, FP4_BOOK]),
    nested=st.booleans(),
    scale=st.sampled_from([1.0, 1e-3, 1e-30, 1e-39]),
    seed=st.integers(0, 10**6),
)
def test_all_forms_give_the_same_bits(
    count: int,
    block_size: int,
    source: torch.dtype,
    target: torch.dtype,
    book: CodeBook,
    nested: bool,
    scale: float,
    seed: int,
) -> None:
    x = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).to(source)
    packed, absmax = blocks4.quantize(x, book, block_size, Path.TORCH)
    state = QuantState(book, block_size, (count,), source, absmax)
    if nested:
        state = QuantState(book, block_size, (count,), source, *quantize_absmax(absmax))
    plain = blocks4.dequantize(packed, state, torch.empty(count, dtype=target), Path.TORCH)
    for path in FORMS:
        ours = blocks4.quantize(x, book, block_size, path)
        assert torch.equal(ours[0], packed)
        assert torch.equal(ours[1], absmax)
        decoded = blocks4.dequantize(packed, state, torch.full((count,), 7.0, dtype=target), path)
        assert torch.equal(decoded.view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(256)
    x[77] = bad
    for path in FORMS:
        with pytest.raises(QuantizationError, match="NaN or infinite"):
            blocks4.quantize(x, NF4_BOOK, path=path)


def test_off_switch_takes_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("a compiled kernel ran")

    monkeypatch.setenv("INLAY_KERNELS", "off")
    monkeypatch.setattr(blocks4, "_dequantize_c", forbidden)
    monkeypatch.setattr(blocks4, "_library", forbidden)
    packed, absmax = blocks4.quantize(torch.ones(64), NF4_BOOK)
    state = QuantState(NF4_BOOK, 64, (64,), torch.float32, absmax)
    assert torch.equal(blocks4.dequantize(packed, state, torch.empty(64)), torch.ones(64))


def test_without_a_compiler_the_plain_form_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    monkeypatch.setattr(blocks4, "_library", blocks4._library.__wrapped__)
    assert blocks4.best_path.__wrapped__() is Path.TORCH


def test_a_library_that_gives_wrong_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = blocks4._dequantize_c

    def broken(packed: object, state: object, out: torch.Tensor, path: Path) -> bool:
        done = honest(packed, state, out, path)  # type: ignore[arg-type]
        out[3] += 1
        return done

    monkeypatch.setattr(blocks4, "_dequantize_c", broken)
    assert blocks4.best_path.__wrapped__() is Path.TORCH


def test_threads_do_not_disturb_each_other() -> None:
    x = torch.randn(64 * 6000)
    packed, absmax = blocks4.quantize(x, NF4_BOOK)
    state = QuantState(NF4_BOOK, 64, (x.numel(),), torch.float32, absmax)
    expected = blocks4.dequantize(packed, state, torch.empty_like(x), Path.TORCH)
    equal: list[bool] = []

    def work() -> None:
        equal.extend(torch.equal(blocks4.dequantize(packed, state, torch.empty_like(x)), expected) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 20


@pytest.mark.gpu
@pytest.mark.parametrize("book", [NF4_BOOK, FP4_BOOK], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_a_gpu_decodes_to_the_same_bits(
    book: CodeBook, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_KERNELS", kernels)
    x = torch.randn(64 * 1000)
    packed, absmax = blocks4.quantize(x, book)
    state = QuantState(book, 64, (x.numel(),), torch.float32, absmax)
    expected = blocks4.dequantize(packed, state, torch.empty_like(x, dtype=dtype))
    there = QuantState(book, 64, (x.numel(),), torch.float32, absmax.cuda())
    out = torch.empty(x.numel(), dtype=dtype, device="cuda")
    assert torch.equal(blocks4.dequantize(packed.cuda(), there, out).cpu(), expected)
    theirs, scales = blocks4.quantize(x.cuda(), book)
    assert torch.equal(theirs.cpu(), packed)
    assert torch.equal(scales.cpu(), absmax)
