"""The fused products against decoding and multiplying in fp64, and what decides whether they are taken."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inlay.kernels import blocks4, blocks4_product
from inlay.kernels.blocks4_product import MOST_ROWS, Form, product
from inlay.quant import FP4, NF4
from inlay.quant.base import BlockQuantization, QuantState
from inlay.quant.model import pack

BOUND = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
FORMS = [
    (form, dtype)
    for dtype in BOUND
    for form in Form
    if (best := blocks4_product.best_form(dtype)) is not None and form <= best
]

pytestmark = pytest.mark.skipif(not FORMS, reason="no C compiler, or no AVX-512")


def weight(O: int, I: int, dtype: torch.dtype, config: BlockQuantization) -> tuple[Tensor, QuantState, Tensor]:
    """Packed, its state, and what it decodes to in fp64."""
    data, state = pack((torch.randn(O, I) * 0.02).to(dtype), config)
    return data, state, blocks4.dequantize(data, state, torch.empty(O, I, dtype=dtype), blocks4.Path.TORCH).double()


def far(ours: Tensor | None, exact: Tensor) -> float:
    """‖ours - exact‖ / ‖exact‖."""
    assert ours is not None
    return float((ours.double() - exact).norm() / exact.norm())


@given(
    case=st.sampled_from(FORMS),
    rows=st.integers(1, 40) | st.sampled_from([255, 256, 257, 300]),
    out=st.sampled_from([32, 64, 96, 320]),
    features=st.sampled_from([64, 128, 192, 320]),
    block_size=st.sampled_from([64, 128, 4096]),
    nested=st.booleans(),
    fp4=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_both_directions(
    case: tuple[Form, torch.dtype],
    rows: int,
    out: int,
    features: int,
    block_size: int,
    nested: bool,
    fp4: bool,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    form, dtype = case
    config = (FP4 if fp4 else NF4)(double_quant=nested, block_size=block_size)
    data, state, w_OI = weight(out, features, dtype, config)
    x_MI, dy_MO, bias_O = (torch.randn(n).to(dtype) for n in ((rows, 1, features), (rows, 1, out), (out,)))
    y_MO = product(x_MI, data, state, bias_O if bias else None, form=form)
    exact = x_MI.double() @ w_OI.t() + (bias_O.double() if bias else 0)
    assert far(y_MO, exact) < BOUND[dtype]
    assert far(product(dy_MO, data, state, backward=True, form=form), dy_MO.double() @ w_OI) < BOUND[dtype]


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("backward", [False, True])
def test_long_sums_in_chunks(form: Form, dtype: torch.dtype, backward: bool) -> None:
    shape = (4160, 64) if backward else (64, 4160)
    data, state, w_OI = weight(*shape, dtype, NF4())
    a_MK = torch.randn(270, 4160).to(dtype)
    exact = a_MK.double() @ (w_OI if backward else w_OI.t())
    assert far(product(a_MK, data, state, backward=backward, form=form), exact) < BOUND[dtype]


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("backward", [False, True])
def test_bits_depend_on_neither_the_other_rows_nor_the_threads(
    form: Form, dtype: torch.dtype, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, state, _ = weight(2080, 2176, dtype, NF4())
    a_MK = torch.randn(300, 2080 if backward else 2176).to(dtype)
    whole = product(a_MK, data, state, backward=backward, form=form)
    assert whole is not None
    for rows in (slice(0, 1), slice(17, 40), slice(250, 300)):
        part = product(a_MK[rows], data, state, backward=backward, form=form)
        assert part is not None
        assert torch.equal(part, whole[rows])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = product(a_MK, data, state, backward=backward, form=form)
    assert again is not None
    assert torch.equal(again, whole)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_a_row_that_is_not_finite_stays_alone(form: Form, dtype: torch.dtype) -> None:
    data, state, w_OI = weight(64, 128, dtype, NF4())
    x_MI, dy_MO = torch.randn(20, 128).to(dtype), torch.randn(20, 64).to(dtype)
    x_MI[3, 5], dy_MO[3, 5] = float("nan"), float("inf")
    kept = [m for m in range(20) if m != 3]
    for backward, a_MK, w_KN in ((False, x_MI, w_OI.t()), (True, dy_MO, w_OI)):
        result = product(a_MK, data, state, backward=backward, form=form)
        assert result is not None
        assert not result[3].isfinite().any()
        assert far(result[kept], a_MK[kept].double() @ w_KN) < BOUND[dtype]


def test_what_does_not_fit_is_decoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(O: int, I: int, config: BlockQuantization, rows: int = 4, dtype: torch.dtype = torch.float32) -> bool:
        data, state, _ = weight(O, I, torch.float32, config)
        return product(torch.randn(rows, I, dtype=dtype), data, state) is not None

    assert taken(64, 64, NF4())
    assert not taken(64, 96, NF4())
    assert not taken(48, 64, NF4())
    assert not taken(64, 64, NF4(block_size=32))
    assert not taken(64, 64, NF4(), dtype=torch.float16)
    assert not taken(64, 64, NF4(), rows=0)
    most = MOST_ROWS[Form.VECTOR, torch.float32]
    assert taken(64, 64, NF4(), rows=most)
    assert not taken(64, 64, NF4(), rows=most + 1)
    monkeypatch.setenv("INLAY_KERNELS", "off")
    assert not taken(64, 64, NF4())


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_a_library_that_multiplies_wrongly_is_not_used(
    form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks4_product._agrees(form, dtype)

    def broken(*arguments: object) -> Tensor:
        result = product(*arguments)  # type: ignore[arg-type]
        assert result is not None
        result[3] *= 1.01
        return result

    monkeypatch.setattr(blocks4_product, "product", broken)
    assert not blocks4_product._agrees(form, dtype)


def test_threads_of_python_do_not_disturb_each_other() -> None:
    form, dtype = FORMS[-1]
    data, state, _ = weight(256, 512, dtype, NF4())
    x_MI = torch.randn(40, 512).to(dtype)
    expected = product(x_MI, data, state, form=form)
    assert expected is not None
    equal: list[bool] = []

    def work() -> None:
        for _ in range(5):
            ours = product(x_MI, data, state, form=form)
            x_MI @ x_MI.t()  # AMX through torch, whose configuration of tiles is its own
            equal.append(ours is not None and torch.equal(ours, expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 15


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_products_of_torch_before_and_after_keep_their_bits(form: Form, dtype: torch.dtype) -> None:
    data, state, _ = weight(128, 128, dtype, NF4())
    x_MI, other = torch.randn(48, 128).to(dtype), torch.randn(128, 96).to(dtype)
    before = x_MI @ other
    for _ in range(3):
        product(x_MI, data, state, form=form)
        assert torch.equal(x_MI @ other, before)
