"""Where virtual tokens stand in a batch of ordinary token ids: the columns before and after they are put in.

A virtual token is a token id behind the real vocabulary. Where the user passes ordinary ids, every row gets the virtual
tokens of its own adapters, at places counted from the first or the last of its real tokens, so that padding never comes
between a prompt and its text. Rows with fewer virtual tokens than others get padding instead: behind the row, which
leaves all of its positions as they are; before the row while generating, where all rows must end together.

Legend: B rows of ids, R rows of the route, T columns of the user, N most virtual tokens of a row, S = T + N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.route import Rows

Place = tuple[int, int]
"""(at, count): `count` virtual tokens after `at` real tokens, or, for at < 0, before the last ~at real tokens."""


@dataclass(frozen=True)
class Token:
    """One virtual token of a row: its number in the row's virtual vocabulary, and where it goes."""

    at: int
    number: int


@dataclass(frozen=True)
class RowTokens:
    """The virtual vocabulary of a row.

    Attributes:
        size: how many virtual tokens it has.
        tokens: those that are put in where the user passes ordinary ids, in the order in which they stand.
        placed: whether that is possible; a template whose places depend on the text needs ids that hold them.
    """

    size: int = 0
    tokens: tuple[Token, ...] = ()
    placed: bool = True


def row_tokens(pieces: Sequence[tuple[int, Sequence[Place] | None]]) -> RowTokens:
    """The virtual vocabulary of a row from (length, places) of each of its pieces in turn."""
    tokens, size = [], 0
    for length, places in pieces:
        ats = [at for at, count in places or () for _ in range(count)]
        tokens += [Token(at, size + number) for number, at in enumerate(ats)]
        size += length
    ordered = sorted(tokens, key=lambda t: (t.at < 0, t.at))
    placed = all(places is not None for _, places in pieces)
    return RowTokens(size, tuple(ordered) if placed else (), placed)


class Layout:
    """One batch with its virtual tokens. `spread` takes a tensor of T columns to S, `gather` takes it back."""

    width: int
    tokens_B: Tensor

    def spread(self, x: Tensor, pad: int, virtual: int | Tensor) -> Tensor:
        """x [B, T, ...] at its columns of [B, S, ...]; `virtual` is one value, or one for each token [B, N, ...]."""
        raise NotImplementedError

    def gather(self, x: Tensor, *, ahead: bool = False, last: int = 0) -> Tensor:
        """The user's columns [B, T, ...] of x [B, S, ...].

        Args:
            x: what the model gave, or its end.
            ahead: for each column take the last one before its successor instead, where the successor is predicted.
            last: only this many of the user's columns, where x holds at least `last` + N columns.
        """
        raise NotImplementedError

    def positions(self, position_ids_BT: Tensor) -> Tensor:
        """The user's positions with room for the virtual tokens, which count on from their neighbours."""
        raise NotImplementedError

    def columns(self, index_B: Tensor) -> Tensor:
        """The new numbers of one of the user's columns per row; numbers outside of the row stay outside."""
        raise NotImplementedError


@dataclass(eq=False)
class Front(Layout):
    """The same number of virtual tokens before every row that begins at once: slices instead of indices."""

    count: int
    user: int
    tokens_B: Tensor

    @property
    def width(self) -> int:  # type: ignore[override]
        """S"""
        return self.user + self.count

    def spread(self, x: Tensor, pad: int, virtual: int | Tensor) -> Tensor:
        if isinstance(virtual, Tensor):
            first = virtual.to(x.dtype).expand(x.shape[0], self.count, *x.shape[2:])
        else:
            first = x.new_full((x.shape[0], self.count, *x.shape[2:]), virtual)
        return torch.cat([first, x], dim=1)

    def gather(self, x: Tensor, *, ahead: bool = False, last: int = 0) -> Tensor:
        return x[:, -last:] if last else x[:, self.count :]

    def positions(self, position_ids_BT: Tensor) -> Tensor:
        steps = torch.arange(self.count, device=position_ids_BT.device, dtype=position_ids_BT.dtype)
        return torch.cat([position_ids_BT[:, :1] + steps, position_ids_BT + self.count], dim=1)

    def columns(self, index_B: Tensor) -> Tensor:
        return index_B + self.count


@dataclass(eq=False)
class Spread(Layout):
    """Any number of virtual tokens at any places of every row; the column S takes what does not exist."""

    width: int
    tokens_B: Tensor
    cols_BT: Tensor
    token_cols_BN: Tensor
    before_BN: Tensor
    """The user's column that each virtual token stands before, T or more where it stands at the end of its row."""
    last_B: Tensor
    """The user's column behind the last real token of each row."""
    shift_B: Tensor
    """How many columns of padding were put before each row."""

    def spread(self, x: Tensor, pad: int, virtual: int | Tensor) -> Tensor:
        out = x.new_full((x.shape[0], self.width + 1, *x.shape[2:]), pad)
        out = out.scatter(1, _like(self.cols_BT, x), x)
        if isinstance(virtual, Tensor):
            values = virtual.to(x.dtype)
        else:
            values = x.new_full((*self.token_cols_BN.shape, *x.shape[2:]), virtual)
        return out.scatter(1, _like(self.token_cols_BN, values), values)[:, : self.width].contiguous()

    def gather(self, x: Tensor, *, ahead: bool = False, last: int = 0) -> Tensor:
        index_BT = self.cols_BT
        if ahead:
            end_B = self.shift_B + index_BT.shape[1] + self.tokens_B
            index_BT = torch.cat([index_BT[:, 1:], end_B[:, None]], dim=1) - 1
        if last:
            index_BT = index_BT[:, -last:] - (self.width - x.shape[1])
        return x[torch.arange(x.shape[0], device=x.device)[:, None], index_BT.to(x.device)]

    def positions(self, position_ids_BT: Tensor) -> Tensor:
        rows, user = self.cols_BT.shape
        position_ids_BT = position_ids_BT.expand(rows, user)
        counts_BT = torch.searchsorted(self.before_BN, _steps(rows, user, self.before_BN), right=True)
        numbers_BN = _steps(rows, self.before_BN.shape[1], self.before_BN)
        end_B1 = self.last_B[:, None]
        neighbour_BN = torch.minimum(self.before_BN, (end_B1 - 1).clamp(min=0)).clamp(max=user - 1)
        at_end_BN = ((self.before_BN >= end_B1) & (end_B1 > 0)).to(position_ids_BT.dtype)
        virtual_BN = position_ids_BT.gather(1, neighbour_BN) + numbers_BN + at_end_BN
        return self.spread(position_ids_BT + counts_BT, 0, virtual_BN)

    def columns(self, index_B: Tensor) -> Tensor:
        user = self.cols_BT.shape[1]
        inside = (index_B >= 0) & (index_B < user)
        moved = self.cols_BT.gather(1, index_B.clamp(0, user - 1)[:, None])[:, 0]
        return torch.where(inside, moved, torch.where(index_B < 0, index_B, index_B + self.width - user))


def _like(index_BK: Tensor, x: Tensor) -> Tensor:
    """The index with the trailing dimensions of x."""
    return index_BK.reshape(*index_BK.shape, *([1] * (x.ndim - 2))).expand(*index_BK.shape, *x.shape[2:])


def _steps(rows: int, count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device).expand(rows, count).contiguous()


class Prompts:
    """Which virtual tokens every row of the route gets. Made once for each route.

    Attributes:
        first: the id of virtual token 0, that is the number of rows of the real embedding table.
        rows: of each row of the route; one entry where all rows are alike.
        most: N, the largest number of virtual tokens of a row.
        front: whether every row has the same tokens, before its text.
        trailing: whether a place is counted from the end of the text.
    """

    def __init__(self, first: int, rows: tuple[RowTokens, ...]) -> None:
        self.first, self.rows = first, rows
        self.most = max(len(row.tokens) for row in rows)
        every = [token for row in rows for token in row.tokens]
        self.front = len(set(rows)) == 1 and all(token.at == 0 for token in every)
        self.trailing = any(token.at < 0 for token in every)
        self.uneven = len({len(row.tokens) for row in rows}) > 1

        def table(values: Sequence[Sequence[int]]) -> Tensor:
            padded = [[*v, *([0] * (self.most - len(v)))] for v in values]
            return torch.tensor(padded, dtype=torch.long, device="cpu")

        self._made = (
            table([[t.at for t in row.tokens] for row in rows]),
            table([[t.number for t in row.tokens] for row in rows]),
            torch.tensor([len(row.tokens) for row in rows], device="cpu"),
            torch.tensor([row.size for row in rows], device="cpu"),
            torch.tensor([row.placed for row in rows], device="cpu"),
        )
        self._moved: dict[torch.device, tuple[Tensor, ...]] = {torch.device("cpu"): self._made}

    def tables(self, entries: int, device: torch.device) -> tuple[Tensor, ...]:
        """at_BN and number_BN of each virtual token (0 where there is none), count_B; size_B and placed_B of each row.

        Raises:
            AdapterError: the rows of ids are no multiple of the rows of the route.
        """
        tables = self._moved.get(device)
        if tables is None:
            tables = tuple(t.to(device) for t in self._made)
            if not torch.compiler.is_compiling():
                self._moved[device] = tables
        if len(self.rows) == 1:
            return tuple(t.expand(entries, *t.shape[1:]) for t in tables)
        each = Rows(total=len(self.rows)).factor(entries)
        return tables if each == 1 else tuple(t.repeat_interleave(each, 0) for t in tables)

    def ids(self, entries: int, device: torch.device) -> Tensor:
        """The ids of the virtual tokens [B, N], in the order in which they stand."""
        return self.first + self.tables(entries, device)[1]

    def at_front(self, entries: int, columns: int, device: torch.device) -> Front:
        """The layout where all rows are alike and begin at once."""
        return Front(self.most, columns, self.tables(entries, device)[2])

    def spread(self, ids_BT: Tensor, mask_BT: Tensor | None, *, left: bool, own_B: Tensor | None = None) -> Spread:
        """The layout for any rows, from tensor operations alone.

        Args:
            ids_BT: the user's ids, or any tensor of that shape and device.
            mask_BT: 0 at padding.
            left: whether the padding of rows with fewer virtual tokens stands before them.
            own_B: rows that hold virtual tokens already; they get none.
        """
        rows, user, device = ids_BT.shape[0], ids_BT.shape[1], ids_BT.device
        at_BN, _, tokens_B, _, _ = self.tables(rows, device)
        if own_B is not None:
            tokens_B = tokens_B.masked_fill(own_B, 0)
        steps_N = torch.arange(self.most, device=device)
        exists_BN = steps_N < tokens_B[:, None]
        first_B, last_B = _span(mask_BT, rows, user, device)
        length_B1 = (last_B - first_B)[:, None]
        offset_BN = torch.where(at_BN >= 0, at_BN, length_B1 - at_BN.bitwise_not()).clamp(min=0)
        before_BN = first_B[:, None] + torch.minimum(offset_BN, length_B1)
        before_BN = before_BN.cummax(1).values.masked_fill(~exists_BN, user + 1)
        shift_B = self.most - tokens_B if left else torch.zeros_like(tokens_B)
        columns_BT = _steps(rows, user, tokens_B)
        counts_BT = torch.searchsorted(before_BN, columns_BT, right=True)
        width = user + self.most
        token_cols_BN = (shift_B[:, None] + before_BN + steps_N).masked_fill(~exists_BN, width)
        cols_BT = shift_B[:, None] + columns_BT + counts_BT
        return Spread(width, tokens_B, cols_BT, token_cols_BN, before_BN, last_B, shift_B)


def _span(mask_BT: Tensor | None, rows: int, user: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns of the first real token of each row and behind its last one; (0, 0) where there is none."""
    if mask_BT is None:
        return torch.zeros(rows, dtype=torch.long, device=device), torch.full((rows,), user, device=device)
    real_BT = mask_BT.ne(0)
    some_B = real_BT.any(1)
    first_B = real_BT.long().argmax(1)
    last_B = user - real_BT.flip(1).long().argmax(1)
    return first_B * some_B, last_B * some_B


__all__ = ["Front", "Layout", "Place", "Prompts", "RowTokens", "Spread", "Token", "row_tokens"]
