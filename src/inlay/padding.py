"""Which positions of the batch now running are padding, for the few pieces that average over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.errors import AdapterError
from inlay.route import Rows


@dataclass(eq=False)
class Padding:
    """The mask of the present forward pass, and the rows of the group that is being served.

    Attributes:
        known: a forward pass has said what its mask is. Without gradients it is forgotten afterwards, so that an inner
            module which is called by itself is refused instead of being given another batch's mask; with gradients it
            stays, for gradient checkpointing runs blocks again during the backward pass.
    """

    mask: Tensor | None = None
    rows: Rows | None = None
    known: bool = False

    def set(self, mask: Tensor | None) -> None:
        """The mask of the pass that begins."""
        self.mask, self.known = mask, True

    def forget(self) -> None:
        """The pass has ended; where nothing can run again, its mask means nothing any more."""
        if not torch.is_grad_enabled():
            self.mask, self.known = None, False

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask [B, T] of the rows and tokens that x holds, or None where every position is real.

        Raises:
            AdapterError: no forward pass of the model is running, so nobody has said what is padding.
        """
        if not self.known:
            raise AdapterError(
                "a gate that averages over tokens has to know which of them are padding, and learns it from the "
                'model\'s own forward. Call the model itself instead of a part of it, or use gate="per_token".'
            )
        mask = self.mask
        if mask is None or mask.ndim != 2 or x.ndim != 3 or mask.shape[1] < x.shape[1]:
            return None
        if self.rows is not None and self.rows.index is not None:
            mask = self.rows.take(mask)
        return mask if mask.shape[0] == x.shape[0] else None
