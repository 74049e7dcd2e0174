"""Groups of rows: who acts on what, and that every row comes back to its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.errors import AdapterError
from inlay.route import Group, Rows, as_names, everyone, join, per_row

NAMES = st.sampled_from([None, "a", "b", "c", ("a", "b"), ("b", "a")])


@given(st.lists(NAMES, min_size=1, max_size=9), st.integers(1, 4))
def test_take_then_join_is_the_identity(rows, k):
    """Whatever the rows, and whether a module sees B, B*T or B*beams entries."""
    groups = per_row(rows)
    x = torch.arange(len(rows) * k * 2).reshape(len(rows) * k, 2)
    assert torch.equal(join(groups, [g.rows.take(x) for g in groups]), x)


@given(st.lists(NAMES, min_size=1, max_size=9))
def test_each_row_is_in_exactly_one_group_with_its_names(rows):
    groups = per_row(rows)
    seen = {}
    for group in groups:
        for i in group.rows.index if group.rows.index is not None else range(len(rows)):
            assert i not in seen
            seen[i] = group.names
    assert [seen[i] for i in range(len(rows))] == [as_names(r, "") for r in rows]


def test_same_names_in_another_order_are_another_group():
    assert len(per_row([("a", "b"), ("b", "a")])) == 2


def test_a_single_name_is_one_group_over_all_rows_whatever_their_number():
    assert everyone(("a",))[0].rows.index is None
    assert per_row(["a", "a"])[0].rows.index == (0, 1)
    assert everyone(("a",))[0].rows.take(torch.ones(3)).shape == (3,)


def test_entries_that_no_row_count_explains_are_refused():
    rows = Rows((0, 2), 3)
    with pytest.raises(AdapterError, match="3 rows, but a module saw 7"):
        rows.take(torch.zeros(7, 2))


def test_a_row_names_an_adapter_once():
    with pytest.raises(AdapterError, match="row 1 names an adapter twice"):
        per_row(["a", ("b", "b")])
    with pytest.raises(AdapterError, match="row 0 must name"):
        per_row([3])  # type: ignore[list-item]


def test_rows_out_of_order_are_gathered():
    rows = Rows((2, 0), 3)
    x = torch.arange(6).reshape(6, 1)
    assert rows.take(x).flatten().tolist() == [4, 5, 0, 1]
    assert not rows.contiguous
    assert Group((), Rows((1, 2), 3)).rows.contiguous
