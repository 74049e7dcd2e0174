"""Which positions of the batch now running are padding, for the few pieces that average over tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inlay.route import Rows


@dataclass(eq=False)
class Padding:
    """The mask of the present forward pass, and the rows of the group that is being served."""

    mask: Tensor | None = None
    rows: Rows | None = None

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask [B, T] of the rows and tokens that x holds, or None where every position is real."""
        mask = self.mask
        if mask is None or mask.ndim != 2 or x.ndim != 3 or mask.shape[1] < x.shape[1]:
            return None
        if self.rows is not None and self.rows.index is not None:
            mask = self.rows.take(mask)
        return mask if mask.shape[0] == x.shape[0] else None
