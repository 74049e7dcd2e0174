"""The counter-based mask: published words, the share that is dropped, and what it depends on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.kernels.philox import draw_seed, keep_mask, philox


def test_the_words_are_those_of_the_published_generator() -> None:
    # Random123's known answers for philox4x32-10 with counter and key zero.
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in philox(0, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(seed=st.integers(0, 2**62 - 1), p=st.floats(0.05, 0.95))
def test_a_share_of_p_is_dropped_and_columns_are_independent(seed: int, p: float) -> None:
    keep = keep_mask(torch.tensor([seed]), 64, 256, p)
    share = keep.double().mean()
    assert abs(float(share) - (1 - p)) < 6 * (p * (1 - p) / keep.numel()) ** 0.5
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[:, :4], keep[:, 4:8])


def test_the_mask_of_a_part_is_a_part_of_the_mask() -> None:
    seed = torch.tensor([1234567890123])
    whole = keep_mask(seed, 9, 22, 0.3)
    assert torch.equal(keep_mask(seed, 5, 10, 0.3), whole[:5, :10])


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_certain_masks(p: float, kept: float) -> None:
    assert keep_mask(torch.tensor([7]), 8, 8, p).float().mean() == kept


def test_seeds_follow_the_generator_of_torch() -> None:
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"))
    assert draw_seed(torch.device("cpu")) != first
    torch.manual_seed(3)
    assert draw_seed(torch.device("cpu")) == first
