"""Many LoRA adapters in one batch, each row with its own, in a fixed number of matrix products.

The plain form is a loop over groups of rows; this gives the same sums. Which formulation is fastest depends on the
shape (measured in `benchmarks/rows.py`): with one token a row and few adapters one wide product whose foreign columns
are put to zero; with one token a row and many adapters a product for each group of rows; with many tokens a row a
batched product over gathered factors.

Legend: N rows, T entries a row, I / O features, K adapters, R the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE = 2.5e6
"""The wide product may cost so many operations for each product that it saves: what starting one costs."""


class LoRARows(nn.Module):
    """y + s_k B_k A_k x for each row with its own k, or y alone for rows without.

    Holds no parameters of its own: `factors` reads them from the pieces at each call, so training sees every step.
    """

    def __init__(self, deltas: Sequence[nn.Module], index: Sequence[int]) -> None:
        """Args:
        deltas: the pieces, with `A` (R_k, I), `B` (O, R_k) and `scale`.
        index: for each row the number of its piece, or -1.
        """
        super().__init__()
        self.__dict__["deltas"] = tuple(deltas)
        self.rank = max(d.A.shape[0] for d in deltas)  # type: ignore[index]
        self.rows = len(index)
        self.width = sum(d.A.shape[0] for d in deltas)  # type: ignore[index, misc]
        own = torch.tensor(index)
        columns = torch.tensor([k for k, d in enumerate(deltas) for _ in range(d.A.shape[0])])  # type: ignore[index]
        # Rows without a piece use one more, of zeros, behind the others.
        self.register_buffer("gather", own.where(own >= 0, len(deltas)), persistent=False)
        self.register_buffer("foreign", columns[None, :].ne(own[:, None]), persistent=False)
        order = sorted((k, i) for i, k in enumerate(index) if k >= 0)
        self.register_buffer("order", torch.tensor([i for _, i in order], dtype=torch.long), persistent=False)
        self.sizes = [sum(k == j for k, _ in order) for j in range(len(deltas))]
        self.__dict__["kept"] = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y with each row's Δ added.

        Args:
            x: [N*k, ..., I], the entries of a row together. y: [N*k, ..., O].
        """
        if self.gather.device != x.device:
            self.to(x.device)
        shape = y.shape
        x, y = x.reshape(self.rows, -1, x.shape[-1]), y.reshape(self.rows, -1, shape[-1])
        if x.shape[1] > 1:
            return self._batched(x, y).reshape(shape)
        x, y = x[:, 0], y[:, 0]
        work = 2 * self.rows * self.width * (x.shape[-1] + y.shape[-1])
        wide = work <= WIDE * len(self.sizes)
        return (self._wide(x, y) if wide else self._grouped(x, y)).reshape(shape)

    def _wide(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self._factors(x.dtype, stacked=False)
        # Foreign columns are overwritten, not multiplied: an adapter that holds NaN spoils its own rows only.
        s = F.linear(x, A).masked_fill(self.foreign, 0.0)  # type: ignore[arg-type]
        return torch.addmm(y, s, B) if y.dtype == s.dtype else y + (s @ B).to(y.dtype)

    def _batched(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self._factors(x.dtype, stacked=True)
        s = torch.bmm(x, A.index_select(0, self.gather).mT)  # type: ignore[arg-type]
        B = B.index_select(0, self.gather)  # type: ignore[arg-type]
        return torch.baddbmm(y, s, B) if y.dtype == s.dtype else y + torch.bmm(s, B).to(y.dtype)

    def _grouped(self, x: Tensor, y: Tensor) -> Tensor:
        parts = x.index_select(0, self.order).split(self.sizes)  # type: ignore[arg-type]
        deltas = [
            F.linear(F.linear(part, d.A.to(x.dtype)), d.B.to(x.dtype)) * d.scale
            for part, d in zip(parts, self.__dict__["deltas"], strict=True)
            if part.shape[0]
        ]
        return y.index_add(0, self.order, torch.cat(deltas).to(y.dtype)) if deltas else y  # type: ignore[arg-type]

    def _factors(self, dtype: torch.dtype, *, stacked: bool) -> tuple[Tensor, Tensor]:
        """All A and s B of the pieces: side by side (K R, I) and (K R, O), or stacked (K + 1, R, I) and (K + 1, R, O).

        Without gradients they are kept until a piece changes.
        """
        deltas = self.__dict__["deltas"]
        if torch.is_grad_enabled():
            return self._make(dtype, stacked)
        mark = (
            dtype,
            stacked,
            *(v for d in deltas for v in (d.A._version, d.B._version, d.A.data_ptr(), d.B.data_ptr())),
        )
        kept = self.__dict__["kept"]
        if kept is None or kept[0] != mark:
            kept = mark, self._make(dtype, stacked)
            self.__dict__["kept"] = kept
        return kept[1]  # type: ignore[no-any-return]

    def _make(self, dtype: torch.dtype, stacked: bool) -> tuple[Tensor, Tensor]:
        As, Bs = [], []
        for d in self.__dict__["deltas"]:
            missing = self.rank - d.A.shape[0] if stacked else 0
            As.append(F.pad(d.A.to(dtype), (0, 0, 0, missing)) if missing else d.A.to(dtype))
            B = d.B.to(dtype).mT * d.scale
            Bs.append(F.pad(B, (0, 0, 0, missing)) if missing else B)
        if stacked:
            nothing = torch.zeros_like(As[0]), torch.zeros_like(Bs[0])
            return torch.stack([*As, nothing[0]]), torch.stack([*Bs, nothing[1]])
        return torch.cat(As), torch.cat(Bs)
