"""Triton's products with a low-rank part against torch, run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from inlay.kernels import triton_products as products
from inlay.kernels.philox import keep_mask
from inlay.kernels.triton_products import Mask, Tile

pytestmark = pytest.mark.usefixtures("natively")

SMALL = Tile(16, 32, 32, 4, 1)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


@settings(max_examples=8)
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    R=st.sampled_from([1, 4, 16, 20]),
    bias=st.booleans(),
    p=st.sampled_from([None, 0.3]),
    transposed=st.booleans(),
)
def test_product(M: int, N: int, K: int, R: int, bias: bool, p: float | None, transposed: bool) -> None:
    torch.manual_seed(0)
    a, low, up = normal(M, K), normal(M, R), normal(R, N)
    w = normal(N, K).mT if transposed else normal(K, N)
    b = normal(N) if bias else None
    mask = None if p is None else Mask(torch.tensor([99]), p)
    keep = 1.0 if mask is None else keep_mask(mask.seed, M, N, mask.p)
    expected = a @ w + 0.5 * keep * (low @ up) + (0 if b is None else b)
    torch.testing.assert_close(products.product(a, w, b, low, up, 0.5, mask, SMALL), expected, rtol=1e-5, atol=1e-5)


def test_product_without_low_rank_part_and_with_several_blocks_a_group() -> None:
    a, w = normal(150, 40), normal(40, 70)
    torch.testing.assert_close(products.product(a, w, None, None, None, 1.0, tile=SMALL), a @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_product_in_half_precision_is_rounded_once(half: torch.dtype) -> None:
    # bf16 on a GPU only: the interpreter keeps it as raw bits and multiplies these.
    a, w, low, up = (normal(*shape, dtype=half) for shape in ((20, 33), (33, 40), (20, 3), (3, 40)))
    exact = a.double() @ w.double() + 0.25 * (low.double() @ up.double())
    out = products.product(a, w, None, low, up, 0.25, tile=SMALL)
    assert out.dtype == half
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(half).eps, atol=1e-5)


@pytest.mark.parametrize("p", [None, 0.4])
@pytest.mark.parametrize("R", [3, 16])
def test_shrink_and_its_gradient(p: float | None, R: int) -> None:
    M, I = 37, 75
    x, A, ds = normal(M, I), normal(R, I), normal(M, R)
    mask = None if p is None else Mask(torch.tensor([2**40 + 5]), p)
    kept = x if mask is None else x * keep_mask(mask.seed, M, I, mask.p)
    s = products.shrink(x, A, 1.25, mask, features=32)
    torch.testing.assert_close(s, 1.25 * kept @ A.mT, rtol=1e-5, atol=1e-5)
    dA = products.shrink_grad(ds, x, 1.25, mask, rows=16)
    torch.testing.assert_close(dA, 1.25 * ds.mT @ kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [None, 0.4])
def test_add_low_rank(p: float | None) -> None:
    M, N = 37, 75
    out, low, up = normal(M, N), normal(M, 5), normal(N, 5).mT
    mask = None if p is None else Mask(torch.tensor([11]), p)
    keep = 1.0 if mask is None else keep_mask(mask.seed, M, N, mask.p)
    expected = out + 2.0 * keep * (low @ up)
    assert products.add_low_rank_(out, low, up, 2.0, mask, 16, 32) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_rows_need_not_lie_together() -> None:
    wide = normal(20, 64)
    a, w = wide[:, :32], normal(32, 16)
    torch.testing.assert_close(products.product(a, w, None, None, None, 1.0, tile=SMALL), a @ w, rtol=1e-5, atol=1e-5)
