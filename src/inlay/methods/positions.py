"""Positions that begin later: for prefixes that were trained as keys and values of earlier positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Frozen, Replacement

TABLES = ("wpe", "position_embeddings", "embed_positions")


class ShiftedPositions(Replacement):
    """The frozen table of positions, read `by` positions later. It has no parameters."""

    def __init__(self, frozen: Frozen, by: int) -> None:
        super().__init__()
        self.frozen, self.by = frozen.keep(), by

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        positions = kwargs.get("position_ids")
        if positions is not None:
            return self.frozen.run(x, *args, **kwargs | {"position_ids": positions + self.by})  # type: ignore[no-any-return]
        if args or kwargs:
            raise MethodError(
                f"{self.frozen.path} was called without position_ids, so its positions cannot be shifted."
            )
        return self.frozen.run(x + self.by)  # type: ignore[no-any-return]


def position_sites(anatomy: Anatomy, attentions: Sequence[Site]) -> list[Site]:
    """The tables of positions that these attentions' tokens are looked up in.

    Raises:
        MethodError: the model has none; its positions enter in another way.
    """
    stacks = {site.stack for site in attentions}
    found = [
        path
        for path, leaf in anatomy.leaves.items()
        if leaf.kind == "embedding"
        and path.rsplit(".", 1)[-1] in TABLES
        and (not anatomy.encoder_decoder or any(s and f".{s}." in f".{path}" for s in stacks))
    ]
    if not found:
        raise MethodError(
            f"{anatomy.model} looks no positions up in a table ({', '.join(TABLES)}), so they cannot be shifted."
        )
    return anatomy.select(found)
