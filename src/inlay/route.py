"""Which adapters act on which rows of the batch: one visible value per model.

A route is a tuple of groups. A group is a set of rows and the names of the adapters that act on them, in order. One
group over all rows is the common case and costs nothing. Rows keep the order that the user gave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import AdapterError

Names = tuple[str, ...]
RowSpec = str | None | Sequence[str]


@dataclass(eq=False)
class Rows:
    """Some rows of a batch of `total`; None means all of them, whatever their number.

    A module may see more leading entries than rows: [B*T, I] in models that flatten, [B*beams, ...] in beam search.
    Both keep a row's entries together, so row i owns entries i*k ... (i+1)*k - 1.
    """

    index: tuple[int, ...] | None = None
    total: int = 0
    _cache: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @property
    def contiguous(self) -> bool:
        """Whether the rows follow one another."""
        return self.index is None or self.index == tuple(range(self.index[0], self.index[0] + len(self.index)))

    def factor(self, entries: int) -> int:
        """How many leading entries belong to one row.

        Raises:
            AdapterError: the entries cannot be split evenly among the rows that the route speaks of.
        """
        if entries % self.total:
            raise AdapterError(
                f"the route names {self.total} rows, but a module saw {entries} entries, which is no multiple of it. "
                "Pass one name per row of this batch to inlay.use()."
            )
        return entries // self.total

    def take(self, tensor: Tensor) -> Tensor:
        """The entries of these rows."""
        if self.index is None:
            return tensor
        k = self.factor(tensor.shape[0])
        if self.contiguous:
            return tensor[self.index[0] * k : (self.index[-1] + 1) * k]
        return tensor.index_select(0, self.entries(k, tensor.device))

    def entries(self, k: int, device: torch.device) -> Tensor:
        """The entry numbers of these rows, k entries to a row."""
        assert self.index is not None
        key = k, device
        if key not in self._cache:
            rows = torch.tensor(self.index, device=device)
            self._cache[key] = (rows[:, None] * k + torch.arange(k, device=device)).reshape(-1)
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that share the same adapters."""

    names: Names
    rows: Rows


def join(groups: Sequence[Group], parts: Sequence[Tensor]) -> Tensor:
    """Puts the groups' results back into the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    widths = {part.shape[-1] for part in parts}
    if len(widths) > 1:
        # Task heads of different width: the classes that a head does not have can never be chosen.
        lowest = torch.finfo(parts[0].dtype).min
        parts = [F.pad(part, (0, max(widths) - part.shape[-1]), value=lowest) for part in parts]
    whole = torch.cat(list(parts))
    order = [i for g in groups for i in (g.rows.index or ())]
    if order == sorted(order):
        return whole
    total = groups[0].rows.total
    k = whole.shape[0] // total
    inverse = torch.empty(total, dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(total)
    entries = (inverse[:, None] * k + torch.arange(k)).reshape(-1).to(whole.device)
    return whole.index_select(0, entries)


def everyone(names: Names) -> tuple[Group, ...]:
    """One group: the same adapters for every row."""
    return (Group(names, Rows()),)


def per_row(rows: Sequence[RowSpec]) -> tuple[Group, ...]:
    """Groups for one entry per row: a name, None for the base alone, or several names in order."""
    wanted: dict[Names, list[int]] = {}
    for i, row in enumerate(rows):
        wanted.setdefault(as_names(row, f"row {i}"), []).append(i)
    return tuple(Group(names, Rows(tuple(index), len(rows))) for names, index in wanted.items())


def as_names(row: RowSpec, where: str) -> Names:
    """The adapter names of one row."""
    if row is None:
        return ()
    names = (row,) if isinstance(row, str) or not isinstance(row, Sequence) else tuple(row)
    if not all(isinstance(n, str) for n in names):
        raise AdapterError(f"{where} must name an adapter, a tuple of adapters, or None, not {row!r}.")
    if len(set(names)) != len(names):
        raise AdapterError(f"{where} names an adapter twice: {names}. Each adapter acts once on a row.")
    return names
