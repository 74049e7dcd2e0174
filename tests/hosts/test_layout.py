"""Layouts of virtual tokens, against lists put together row by row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.hosts.layout import Prompts, RowTokens, row_tokens

FIRST, PAD = 1000, 7

places = st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 3)), max_size=3).map(tuple)
vocabularies = st.lists(places, max_size=2).map(lambda ps: row_tokens([(sum(c for _, c in p), p) for p in ps]))


@st.composite
def batches(draw):
    rows = draw(st.integers(1, 4))
    user = draw(st.integers(1, 6))
    mask = [[draw(st.booleans()) for _ in range(user)] for _ in range(rows)]
    return draw(st.lists(vocabularies, min_size=rows, max_size=rows)), mask, draw(st.booleans())


def by_hand(row, real, left, most):
    """One row as a list of (kind, value): the user's columns, virtual tokens at their places, padding at one end."""
    columns = [i for i, r in enumerate(real) if r]
    first, last = (columns[0], columns[-1] + 1) if columns else (0, 0)
    length = last - first
    out = [("user", c) for c in range(len(real))]
    inserts, at = [], 0
    for token in row.tokens:
        offset = token.at if token.at >= 0 else length - ~token.at
        at = max(at, first + min(max(offset, 0), length))
        inserts.append((at, token.number))
    for place, number in reversed(inserts):
        out.insert(place, ("virtual", number))
    pads = [("pad", 0)] * (most - len(inserts))
    return pads + out if left else out + pads


@given(batches())
def test_every_column_is_where_it_is_by_hand(drawn):
    rows, mask, left = drawn
    if not any(row.tokens for row in rows):
        return
    prompts = Prompts(FIRST, tuple(rows))
    user = len(mask[0])
    ids_BT = torch.arange(len(rows) * user).reshape(len(rows), user) + 10
    layout = prompts.spread(ids_BT, torch.tensor(mask), left=left)
    ids_BS = layout.spread(ids_BT, PAD, prompts.ids(len(rows), ids_BT.device))
    expected = [by_hand(row, real, left, prompts.most) for row, real in zip(rows, mask, strict=True)]
    value = {"user": lambda r, v: int(ids_BT[r, v]), "virtual": lambda r, v: FIRST + v, "pad": lambda r, v: PAD}
    assert ids_BS.tolist() == [[value[k](r, v) for k, v in row] for r, row in enumerate(expected)]
    assert torch.equal(layout.gather(ids_BS), ids_BT)

    numbers_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    content = [[c for c, (kind, _) in enumerate(row) if kind != "pad"] for row in expected]
    own = [[c for c, (kind, _) in enumerate(row) if kind == "user"] for row in expected]
    ahead = [[*(c - 1 for c in row[1:]), whole[-1]] for row, whole in zip(own, content, strict=True)]
    assert layout.gather(numbers_BS, ahead=True).tolist() == ahead
    last = min(2, user)
    tail = layout.gather(numbers_BS[:, -(last + prompts.most) :], last=last)
    assert tail.tolist() == [row[-last:] for row in own]
    for column in (-100, -1, *range(user), user, user + 5):
        moved = layout.columns(torch.full((len(rows),), column)).tolist()
        inside = 0 <= column < user
        assert all(
            (m == row[column]) if inside else not 0 <= m < layout.width for m, row in zip(moved, own, strict=True)
        )


@given(batches())
def test_positions_count_on_through_virtual_tokens(drawn):
    """Content keeps counting by one wherever the user's positions do, and the first one keeps its number."""
    rows, mask, left = drawn
    if not any(row.tokens for row in rows):
        return
    prompts = Prompts(FIRST, tuple(rows))
    user = len(mask[0])
    positions_BT = torch.arange(user).expand(len(rows), user) + 3
    layout = prompts.spread(positions_BT, torch.tensor(mask), left=left)
    positions_BS = layout.positions(positions_BT)
    for r, (row, real) in enumerate(zip(rows, mask, strict=True)):
        kinds = [kind for kind, _ in by_hand(row, real, left, prompts.most)]
        content = [int(positions_BS[r, c]) for c, kind in enumerate(kinds) if kind != "pad"]
        assert content == list(range(3, 3 + len(content)))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_slices_and_indices_agree(count, rows, user, padded):
    prompts = Prompts(FIRST, (row_tokens([(count, ((0, count),))]),))
    assert prompts.front
    mask_BT = torch.ones(rows, user)
    if padded:
        mask_BT[0, user // 2 + 1 :] = 0
    x_BTD = torch.randn(rows, user, 2)
    front, spread = prompts.at_front(rows, user, x_BTD.device), prompts.spread(mask_BT, mask_BT, left=False)
    assert front.width == spread.width
    assert torch.equal(front.spread(x_BTD, 0, 5), spread.spread(x_BTD, 0, 5))
    wide = front.spread(x_BTD, 0, 5)
    for options in ({}, {"last": 1}, {"ahead": True}):
        assert torch.equal(front.gather(wide, **options), spread.gather(wide, **options))
    positions_BT = torch.arange(user)[None] + torch.arange(rows)[:, None]
    assert torch.equal(front.positions(positions_BT), spread.positions(positions_BT))
    index_B = torch.arange(rows) % user
    assert torch.equal(front.columns(index_B), spread.columns(index_B))


def test_tokens_of_several_pieces_stand_by_place_and_keep_their_numbers():
    row = row_tokens([(3, ((0, 2), (-1, 1))), (2, ((0, 1), (-2, 1)))])
    assert [(t.at, t.number) for t in row.tokens] == [(0, 0), (0, 1), (0, 3), (-2, 4), (-1, 2)]
    assert row.size == 5
    assert row_tokens([(3, None), (2, ((0, 2),))]) == RowTokens(5, (), placed=False)
