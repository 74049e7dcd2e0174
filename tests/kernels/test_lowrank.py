"""The compiled skinny products against double precision, for every instruction set that this machine has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.kernels import compiled, lowrank

LIBRARY = lowrank._library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no AVX512-BF16, or no compiler")
LEVELS = range(1, (LIBRARY.level if LIBRARY else 0) + 1)
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 96, 130]))


def draw(seed, *shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=30, deadline=None)
@given(
    M=SIZES, I=SIZES, O=SIZES, R=st.sampled_from([1, 3, 8, 16, 17, 40]), workers=st.integers(1, 3), add=st.booleans()
)
def test_both_directions(level, M, I, O, R, workers, add):
    x_MI, dy_MO, A_RI, B_OR = (
        draw(1, M, I), draw(2, M, O), draw(3, R, I, dtype=torch.float32), draw(4, O, R, dtype=torch.float32)
    )  # fmt: skip
    y_MO, dx_MI = draw(5, M, O), draw(6, M, I)
    x, dy, A, B = x_MI.double(), dy_MO.double(), A_RI.bfloat16().double(), B_OR.bfloat16().double()
    ours, into = y_MO.clone(), dx_MI.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LIBRARY, "level", level)
        patch.setattr(lowrank, "_workers", lambda work: workers)
        s_MR = lowrank.add_low_rank(x_MI, A_RI, B_OR, 0.5, ours)
        dA_RI, dB_OR = lowrank.factor_grads(dy_MO, x_MI, s_MR, A_RI, B_OR, 0.5, into, add)
        again = lowrank.factor_grads(dy_MO, x_MI, s_MR, A_RI, B_OR, 0.5, None, add)
    s, ds = s_MR.double(), (0.5 * dy @ B).bfloat16().double()
    rounding = 2**-8  # one value in bf16; sums of many have less
    assert error(s, x @ A.T) < rounding
    assert error(ours, y_MO.double() + 0.5 * s @ B.T) < rounding
    assert error(dB_OR, 0.5 * dy.T @ s) < 1e-5
    assert error(dA_RI, ds.T @ x) < rounding
    assert error(into, ds @ A + (dx_MI.double() if add else 0)) < rounding
    wide_OR = draw(7, M, R, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LIBRARY, "level", level)
        patch.setattr(lowrank, "_workers", lambda work: workers)
        torch.testing.assert_close(
            lowrank.cross(x_MI, A_RI, wide_OR).double(),
            ((x @ A.T) * wide_OR).sum(-1),
            rtol=1e-4,
            atol=1e-4 * R * I**0.5,
        )
    assert torch.equal(again[0], dA_RI)
    assert torch.equal(again[1], dB_OR)


def test_levels_agree_and_nothing_is_written_beside_the_result():
    """A range of features of a wider y, an x that is not contiguous, and a NaN that stays in its row."""
    wide_MO, x_MI = draw(1, 50, 90), draw(2, 70, 50).t()
    A_RI, B_OR = draw(3, 4, 70, dtype=torch.float32), draw(4, 33, 4, dtype=torch.float32)
    x_MI[7, 3] = float("nan")
    results = []
    for level in LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LIBRARY, "level", level)
            y_MO = wide_MO.clone()
            lowrank.add_low_rank(x_MI, A_RI, B_OR, 2.0, y_MO[:, 20:53])
        assert torch.equal(y_MO[:, :20], wide_MO[:, :20])
        assert torch.equal(y_MO[:, 53:], wide_MO[:, 53:])
        assert y_MO.isnan().any(-1).nonzero().flatten().tolist() == [7]
        results.append(y_MO.nan_to_num())
    torch.testing.assert_close(results[0], results[-1], rtol=2e-2, atol=2e-2)


def test_zero_factors_leave_every_bit():
    y_MO = draw(1, 40, 64)
    ours = y_MO.clone()
    lowrank.add_low_rank(draw(2, 40, 32), draw(3, 8, 32, dtype=torch.float32), torch.zeros(64, 8), 2.0, ours)
    assert torch.equal(ours, y_MO)


def test_oneDNN_and_the_kernel_take_turns():
    """Both set up the processor's tiles; neither may leave them in a state that harms the other."""
    x, w = draw(1, 64, 256), draw(2, 256, 256)
    A_RI, B_OR = draw(3, 16, 256, dtype=torch.float32), draw(4, 256, 16, dtype=torch.float32)
    wanted = x @ w
    for _ in range(3):
        lowrank.add_low_rank(x, A_RI, B_OR, 1.0, torch.zeros(64, 256, dtype=torch.bfloat16))
        assert torch.equal(x @ w, wanted)


@pytest.mark.parametrize(
    ("rows", "factor", "rank"),
    [
        (torch.float32, torch.float32, 4),
        (torch.bfloat16, torch.bfloat16, 4),
        (torch.bfloat16, torch.float32, lowrank.MOST + 1),
    ],
)
def test_what_it_does_not_take(rows, factor, rank):
    assert lowrank.fits(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(4, 8), torch.zeros(8, 4))
    A_RI, B_OR = torch.zeros(rank, 8, dtype=factor), torch.zeros(8, rank, dtype=factor)
    assert not lowrank.fits(torch.zeros(2, 8, dtype=rows), A_RI, B_OR)


def test_switched_off(monkeypatch):
    monkeypatch.setenv("INLAY_KERNELS", "off")
    lowrank._library.cache_clear()
    try:
        assert not compiled.enabled()
        assert not lowrank.fits(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(4, 8), torch.zeros(8, 4))
    finally:
        monkeypatch.undo()
        lowrank._library.cache_clear()
