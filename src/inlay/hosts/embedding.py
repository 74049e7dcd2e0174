"""The host on a token embedding: a leaf that also serves the rows of virtual vocabularies.

Ids from the table's size on are virtual tokens. Which adapter they belong to is said by the route: id `size + j` in a
row is token j of that row's own virtual vocabulary, the tokens of its adapters one after another. So a data set
that was encoded with virtual ids fits every adapter with as many tokens, under any name.

Legend: B rows, T tokens, N virtual tokens of all groups together, I features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.hosts.base import Hosted
from inlay.hosts.layout import Prompts, RowTokens, row_tokens
from inlay.hosts.leaf import LeafHost, Plan
from inlay.hosts.leaf import _run as run_plan
from inlay.methods.base import VirtualTokens
from inlay.route import Group


@dataclass(eq=False)
class Served:
    """The virtual tokens of each group of rows, and the plan of a leaf for everything else.

    Attributes:
        leaf: what `LeafHost` does here, None for nothing.
        groups: the route.
        tokens: the pieces of each group.
        absent: set while no id is a virtual one.
        offset_R, size_R: for each row of the route (one where all are alike) where its virtual vocabulary begins among
            those of all groups, and how many tokens it has.
    """

    leaf: Plan | None
    groups: tuple[Group, ...]
    tokens: tuple[tuple[VirtualTokens, ...], ...]
    absent: bool = False
    offset_R: Tensor = field(init=False)
    size_R: Tensor = field(init=False)

    def __post_init__(self) -> None:
        first = self.groups[0].rows
        rows = 1 if first.index is None else first.total
        self.offset_R, self.size_R = torch.zeros(2, rows, dtype=torch.long, device="cpu")
        start = 0
        for group, pieces in zip(self.groups, self.tokens, strict=True):
            size = sum(piece.length for piece in pieces)
            for row in (0,) if group.rows.index is None else group.rows.index:
                self.offset_R[row], self.size_R[row] = start, size
            start += size

    @property
    def blank(self) -> bool:
        """Whether padding stands at the virtual tokens: they are served by another embedding."""
        return self.total == 0

    @property
    def total(self) -> int:
        """N"""
        return sum(piece.length for pieces in self.tokens for piece in pieces)

    def vocabulary(self, dtype: torch.dtype) -> Tensor:
        """The virtual vocabularies of all groups [N, I]."""
        parts = [piece() for pieces in self.tokens for piece in pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)

    def index(self, number: Tensor) -> Tensor:
        """Numbers in a row's own vocabulary as rows of `vocabulary`; a number that the row has not points behind it."""
        offset_B, size_B = self.offset_R.to(number.device), self.size_R.to(number.device)
        if len(offset_B) > 1:
            each = self.groups[0].rows.factor(number.shape[0])
            offset_B, size_B = offset_B.repeat_interleave(each), size_B.repeat_interleave(each)
        shape = -1, *([1] * (number.ndim - 1))
        return torch.where(number < size_B.reshape(shape), number + offset_B.reshape(shape), self.total)


class EmbeddingHost(LeafHost):
    """Serves `Delta`, `Replacement` and `VirtualTokens` pieces."""

    num_embeddings: int
    padding_idx: int | None

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> Any:
        """A leaf's plan, with the virtual tokens of each group where there are any."""
        plan = super().make_plan(state, groups)
        tokens = tuple(_tokens(state, g) for g in groups)
        if not any(tokens):
            return plan
        return Served(plan, groups, tokens)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The frozen embedding's result with the active pieces applied, and virtual tokens where ids ask for them."""
        plan = self._inlay.plan
        if not isinstance(plan, Served):
            return super().forward(input, *args, **kwargs)
        if plan.absent:
            return self._embed(plan, input, args, kwargs)
        virtual = input >= self.num_embeddings
        y = self._embed(plan, input.masked_fill(virtual, self.padding_idx or 0), args, kwargs)
        if plan.blank:
            return y
        index = torch.where(virtual, plan.index(input - self.num_embeddings), 0)
        return torch.where(virtual.unsqueeze(-1), F.embedding(index, plan.vocabulary(y.dtype)), y)

    def _embed(self, plan: Served, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the embedding gives for ordinary ids."""
        frozen = super(LeafHost, self).forward  # type: ignore[misc]
        return frozen(ids, *args, **kwargs) if plan.leaf is None else run_plan(plan.leaf, frozen, (ids, *args), kwargs)


def _tokens(state: Hosted, group: Group) -> tuple[VirtualTokens, ...]:
    placed = [p.piece for name in group.names for p in state.placed.get(name, ())]
    return tuple(piece for piece in placed if isinstance(piece, VirtualTokens))


@dataclass(eq=False)
class Serving:
    """What the model host needs to know where virtual tokens are at work.

    Attributes:
        module: the embedding that serves them; in a model with several, that of the encoder.
        plan: its plan.
        prompts: which tokens every row gets.
        everywhere: whether the other embeddings of the model serve them too.
    """

    module: EmbeddingHost
    plan: Served
    prompts: Prompts
    everywhere: bool


def serving(plans: Iterable[tuple[Any, Any]]) -> Serving | None:
    """The virtual tokens that are at work under these plans of a model's hosts, if any are."""
    found = [(m, p) for m, p in plans if isinstance(m, EmbeddingHost) and isinstance(p, Served) and not p.blank]
    if not found:
        return None
    module, plan = found[0]
    rows = [RowTokens()] * len(plan.size_R)
    for group, pieces in zip(plan.groups, plan.tokens, strict=True):
        own = row_tokens([(piece.length, piece.places) for piece in pieces])
        for row in (0,) if group.rows.index is None else group.rows.index:
            rows[row] = own
    return Serving(module, plan, Prompts(module.num_embeddings, tuple(rows)), len(found) > 1)
