"""The held-out part: of the right size, by class and source, rows whole, by seed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inlay.data.splits import hold_out


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=60),
    st.floats(0, 0.9),
    st.integers(0, 5),
)
def test_rows_stay_whole_and_nothing_is_lost(rows: list[tuple[int, int]], fraction: float, seed: int) -> None:
    groups = np.repeat(np.arange(len(rows)), [count for count, _ in rows])
    strata = np.repeat([stratum for _, stratum in rows], [count for count, _ in rows])
    train, held = hold_out(groups, strata, fraction, seed)
    assert sorted([*train, *held]) == list(range(len(groups)))
    assert not set(groups[train]) & set(groups[held])
    assert list(train) == sorted(train)
    assert list(held) == sorted(held)
    assert len(train) or not len(held)
    if fraction == 0 or len(rows) == 1:
        assert not len(held)
    else:
        assert len(held)


def test_classes_have_their_shares() -> None:
    strata = np.array([0] * 700 + [1] * 200 + [2] * 100)
    train, held = hold_out(np.arange(1000), strata, 0.1, 3)
    assert np.bincount(strata[held]).tolist() == [70, 20, 10]
    assert len(train) == 900


def test_the_only_row_of_a_class_is_for_training() -> None:
    strata = np.array([0] * 50 + [1])
    for seed in range(20):
        _, held = hold_out(np.arange(51), strata, 0.5, seed)
        assert 50 not in held


def test_the_seed_decides() -> None:
    splits = [hold_out(np.arange(100), np.zeros(100, int), 0.2, seed)[1].tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
