"""Many LoRA adapters in one batch, each row with its own, in a fixed number of matrix products.

The plain form is a loop over groups of rows; this gives the same sums. Without gradients in fp32 on a CPU, compiled C
reads each adapter's factors once for all of its rows. Elsewhere the fastest formulation depends on the shape (measured
in `benchmarks/rows.py`): with one token a row and few adapters one wide product whose foreign columns are put to zero;
with one token a row and many adapters a product for each group of rows; with many tokens a row a batched product over
gathered factors.

Legend: N rows, T entries a row, I / O features, K adapters, R the largest rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import stepping
from inlay.kernels import compiled
from inlay.kernels.lora import usable
from inlay.methods.base import Rowwise
from inlay.route import Rows

if TYPE_CHECKING:
    from inlay.methods.lora import LoRADelta

WIDE = 2.5e6
"""The wide product may cost so many operations for each product that it saves: what starting one costs."""

RANKS, MOST, SKINNY = 4, 256, 16
"""The C form takes ranks in steps of `RANKS` up to `MOST`; where a row has several tokens it wins up to `SKINNY`."""

THREADED_FROM = 1 << 22
"""Multiplications from which the C form starts threads."""

_kept: WeakKeyDictionary[LoRADelta, tuple[object, tuple[Tensor, Tensor]]] = WeakKeyDictionary()
"""The factors of some pieces beside each other, with the first of them, and what they were made from."""


class LoRARows(Rowwise):
    """y + s_k B_k A_k x for each row with its own k, or y alone for rows without.

    Holds no parameters of its own: they are read from the pieces at each call, so training sees every step. Compiled,
    it is one program for all compositions of a batch of N rows: the pieces of all adapters, and an index.
    """

    used: tuple[LoRADelta, ...]
    all: tuple[LoRADelta, ...]
    dropping: tuple[LoRADelta, ...]
    parts: tuple[Tensor, ...]
    order: Tensor
    gather: Tensor
    foreign: Tensor
    all_gather: Tensor
    all_foreign: Tensor

    def __init__(self, deltas: Sequence[LoRADelta], index: Sequence[int]) -> None:
        """Makes the index tensors.

        Args:
            deltas: the pieces, with `A` (R_k, I), `B` (O, R_k) and `scale`.
            index: for each row the number of its piece, or -1.
        """
        super().__init__()
        self.rows = len(index)
        used = sorted({k for k in index if k >= 0})
        self.__dict__["all"] = tuple(deltas)
        self.__dict__["used"] = tuple(deltas[k] for k in used)
        self.__dict__["dropping"] = tuple(d for d in self.used if d.dropout)
        self.__dict__["parts"] = tuple(p for d in self.used for p in (d.A, d.B))
        stepping.start()
        renumbered = [used.index(k) if k >= 0 else -1 for k in index]
        self._index("", self.used, renumbered)
        self._index("all_", self.all, index)
        order = sorted((k, i) for i, k in enumerate(renumbered) if k >= 0)
        self.register_buffer("order", torch.tensor([i for _, i in order], dtype=torch.long), persistent=False)
        self.sizes = [sum(k == j for k, _ in order) for j in range(len(used))]
        self.width = sum(d.A.shape[0] for d in self.used)
        self.rank = max((d.A.shape[0] for d in self.used), default=0)
        self.in_c = bool(used) and compiled.enabled()
        self._entries: tuple[int, Tensor, Tensor, int] | None = None

    def _index(self, prefix: str, deltas: Sequence[LoRADelta], index: Sequence[int]) -> None:
        own = torch.tensor(index)
        columns = torch.tensor([k for k, d in enumerate(deltas) for _ in range(d.A.shape[0])])
        # Rows without a piece use one more, of zeros, behind the others.
        self.register_buffer(f"{prefix}gather", own.where(own >= 0, len(deltas)), persistent=False)
        self.register_buffer(f"{prefix}foreign", columns[None, :].ne(own[:, None]), persistent=False)

    @property
    def loops(self) -> bool:
        return any(d.training for d in self.dropping)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y with each row's Δ added.

        Args:
            x: [N*k, ..., I], the entries of a row together. y: [N*k, ..., O].

        Raises:
            AdapterError: the entries are no multiple of the rows.
        """
        done = self._compiled(x, y)
        if done is not None:
            return done
        if self.all_gather.device != x.device:
            self.to(x.device)
        if x.shape[0] % self.rows:
            Rows(tuple(range(self.rows)), self.rows).factor(x.shape[0])
        shape = y.shape
        x, y = x.reshape(self.rows, -1, x.shape[-1]), y.reshape(self.rows, -1, shape[-1])
        if torch.compiler.is_compiling():
            deltas, gather, foreign = self.all, self.all_gather, self.all_foreign
        else:
            deltas, gather, foreign = self.used, self.gather, self.foreign
        if x.shape[1] > 1:
            return self._batched(x, y, deltas, gather).reshape(shape)
        x, y = x[:, 0], y[:, 0]
        work = 2 * self.rows * self.width * (x.shape[-1] + y.shape[-1])
        if torch.compiler.is_compiling() or work <= WIDE * len(self.sizes):
            return self._wide(x, y, deltas, foreign).reshape(shape)
        return self._grouped(x, y).reshape(shape)

    def _compiled(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The sum in C, in y itself where nobody else has it; None where it does not apply or would be slower."""
        # The compiler looks at nothing below, which differs between compositions of a batch.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self.in_c:
            return None
        if not (x.dtype is torch.float32 is y.dtype and x.is_contiguous() and y.is_contiguous() and x.is_cpu):
            return None
        into = x.shape[-1]
        tokens, rest = divmod(x.numel(), into * self.rows)
        library = _library() if usable(x) and usable(y) else None
        if rest or not tokens or self.rank > (MOST if tokens == 1 else SKINNY) or library is None:
            return None
        A_KRI, B_KRO = self._factors(self.used, torch.float32, stacked=True)
        if self._entries is None or self._entries[0] != tokens:
            self._entries = self._segments(tokens)
        _, order, first, count = self._entries
        out = y if self.fresh else y.clone()
        _, rank, wide = B_KRO.shape
        threads = torch.get_num_threads() if count * rank * (into + wide) >= THREADED_FROM else 1
        failed = library(
            x.data_ptr(), out.data_ptr(), A_KRI.data_ptr(), B_KRO.data_ptr(), order.data_ptr(), first.data_ptr(),
            len(self.used), rank, into, wide, threads,
        )  # fmt: skip
        if failed:
            raise RuntimeError(f"inlay_lora_rows cannot take rank {rank}")
        return out

    def _segments(self, tokens: int) -> tuple[int, Tensor, Tensor, int]:
        """For so many tokens a row: the entries of all rows with an adapter, and where each adapter's begin."""
        order = (self.order[:, None] * tokens + torch.arange(tokens)).reshape(-1)
        return tokens, order, torch.tensor([0, *self.sizes]).cumsum(0) * tokens, order.numel()

    def _wide(self, x: Tensor, y: Tensor, deltas: Sequence[LoRADelta], foreign: Tensor) -> Tensor:
        A, B = self._factors(deltas, x.dtype, stacked=False)
        # Foreign columns are overwritten, not multiplied: an adapter that holds NaN spoils its own rows only.
        s = F.linear(x, A).masked_fill(foreign, 0.0)
        return torch.addmm(y, s, B) if y.dtype == s.dtype else y + (s @ B).to(y.dtype)

    def _batched(self, x: Tensor, y: Tensor, deltas: Sequence[LoRADelta], gather: Tensor) -> Tensor:
        A, B = self._factors(deltas, x.dtype, stacked=True)
        s = torch.bmm(x, A.index_select(0, gather).mT)
        B = B.index_select(0, gather)
        return torch.baddbmm(y, s, B) if y.dtype == s.dtype else y + torch.bmm(s, B).to(y.dtype)

    def _grouped(self, x: Tensor, y: Tensor) -> Tensor:
        parts = x.index_select(0, self.order).split(self.sizes)
        deltas = [
            F.linear(F.linear(part, d.A.to(x.dtype)), d.B.to(x.dtype)) * d.scale
            for part, d in zip(parts, self.used, strict=True)
        ]
        return y.index_add(0, self.order, torch.cat(deltas).to(y.dtype)) if deltas else y

    def _factors(self, deltas: Sequence[LoRADelta], dtype: torch.dtype, *, stacked: bool) -> tuple[Tensor, Tensor]:
        """All A and s B of the pieces: side by side (K R, I) and (K R, O), or stacked (K + 1, R, I) and (K + 1, R, O).

        Without gradients they are kept until a piece changes, and longer than a route: the next batch of the same
        adapters finds them.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or deltas is not self.used:
            return _make(deltas, dtype, stacked)
        # Fused optimizers raise no version counter, so their steps are counted.
        pointers, seen = tuple([p.data_ptr() for p in self.parts]), sum([p._version for p in self.parts])
        mark = dtype, stacked, stepping.count(), seen, pointers
        found = _kept.get(self.used[0])
        if found is None or found[0] != mark:
            found = _kept[self.used[0]] = mark, _make(deltas, dtype, stacked, RANKS)
        return found[1]


@cache
def _library() -> Callable[..., int] | None:
    library = compiled.load("lora_rows.c")
    if library is None:
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.inlay_lora_rows.argtypes = [*[pointer] * 6, *[long] * 4, ctypes.c_int]
    function: Callable[..., int] = library.inlay_lora_rows
    return function


def _make(deltas: Sequence[LoRADelta], dtype: torch.dtype, stacked: bool, steps: int = 1) -> tuple[Tensor, Tensor]:
    """`_factors`, with zeros up to a rank that is a multiple of `steps` where they are stacked."""
    rank = -(-max(d.A.shape[0] for d in deltas) // steps) * steps
    As, Bs = [], []
    for d in deltas:
        missing = rank - d.A.shape[0] if stacked else 0
        A, B = d.A.to(dtype), d.B.to(dtype).mT * d.scale
        As.append(F.pad(A, (0, 0, 0, missing)) if missing else A)
        Bs.append(F.pad(B, (0, 0, 0, missing)) if missing else B)
    if stacked:
        return torch.stack([*As, torch.zeros_like(As[0])]), torch.stack([*Bs, torch.zeros_like(Bs[0])])
    return torch.cat(As), torch.cat(Bs)
