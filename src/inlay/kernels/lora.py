"""A frozen projection with low-rank pieces as one step of autograd.

    y = x Wᵀ + b + Σ s (x̂ Aᵀ) Bᵀ          x̂ = dropout(x)
    dx = dy W + Σ dropout'(s (dy B) A)      dB = s dyᵀ (x̂ Aᵀ)      dA = s (dy B)ᵀ x̂

Every product goes through the rank. Kept for the backward pass are x, which the projections that read it share, the
rank-R product x̂ Aᵀ, and a seed for the dropout mask; sums go into the result of the large product. Nothing is kept of
the frozen weight but itself, and dx is computed only where it is asked for.

Shapes: M rows (all leading dimensions), I / O features entering / leaving, R rank.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.anatomy.base import Columns
from inlay.kernels import dropout, gemm, lowrank, triton_select
from inlay.kernels.frozen import Saved, Storage, bias_of, storage_of, weight_of
from inlay.memo import versions
from inlay.route import Rows

Products = tuple[tuple[Tensor, Tensor, float, Columns | None], ...]

SEVERAL = 8
"""Tokens of a row from which a slice for each adapter beats one product for all of them."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


SMALL = 1 << 16
"""Values of dy below which calls cost more than what they compute."""

ALL = slice(None)


class LowRankDelta(Protocol):
    """A piece that is s B A x̂ in the end."""

    scale: float
    dropout: float
    training: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """A of shape (R, I) and B of shape (O, R), differentiable in what they are made of."""

    def masters(self) -> tuple[Tensor, ...]:
        """The parameters that the factors are made of."""


class Term(NamedTuple):
    """What one low-rank piece is besides A and B: where it writes, its scale, its mask of this call, its rows of M."""

    columns: Columns | None
    scale: float
    mask: dropout.Mask | None
    rows: slice = ALL


class LoRALinear:
    """What a hosted projection gives for x, with the low-rank pieces that act on what leaves it.

    Made once for a route. It answers None where the plain form must do: for what is compiled or transformed, for
    tensors of a class of their own, for a weight that is trained itself, and for dropout on devices without the kernel.
    """

    def __init__(
        self,
        deltas: Sequence[LowRankDelta],
        columns: Sequence[Columns | None],
        base: type[nn.Module],
        storage: Storage,
        rows: Sequence[Rows] | None = None,
    ) -> None:
        self.deltas, self.columns, self.base, self.storage = tuple(deltas), tuple(columns), base, storage
        self.rows = None if rows is None else tuple(rows)
        self._forward: Any = base.forward
        self._drops = any(d.dropout for d in deltas)
        self._alone = len(self.deltas) == 1 and self.columns[0] is None and rows is None
        self._terms = tuple(Term(c, d.scale, None) for d, c in zip(deltas, columns, strict=True))
        self._kept: tuple[object, Products] | None = None

    @classmethod
    def make(
        cls,
        deltas: Sequence[LowRankDelta],
        columns: Sequence[Columns | None],
        base: type[nn.Module],
        rows: Sequence[Rows] | None = None,
    ) -> LoRALinear | None:
        """For leaves of this class, or None.

        Args:
            deltas: the pieces.
            columns: the features that each of them writes.
            base: the class of the leaf.
            rows: the rows of the batch that each of them acts on, neighbours of each other; None for all rows.
        """
        storage = storage_of(base)
        return None if storage is None else cls(deltas, columns, base, storage, rows)

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """y of shape (..., O) for x of shape (..., I), or None."""
        if not usable(x) or (self.rows is not None and not self._pays(x, self.rows[0].total)):
            return None
        return self._with_grad(module, x) if torch.is_grad_enabled() else self._without_grad(module, x)

    @staticmethod
    def _pays(x: Tensor, total: int) -> bool:
        """Whether rows apart are best served a slice at a time: in training, where a row has several tokens.

        On a GPU a launch for each slice would cost more than the gathered product.
        """
        tokens = x.numel() // x.shape[-1]
        return x.is_cpu and torch.is_grad_enabled() and x.shape[0] % total == 0 and tokens >= SEVERAL * total

    def _with_grad(self, module: Any, x: Tensor) -> Tensor | None:
        dtype = dtype_of(module, x, self.storage)
        found = None if dtype is None else self.storage.read(module)
        bias_O = bias_of(module)
        if dtype is None or found is None or (bias_O is not None and bias_O.requires_grad):
            return None
        if self._alone and x.dtype == dtype and triton_select.usable(x):
            added = self._in_triton(x, bias_O, found)
            if added is not None:
                return added
        shared = x if x.dtype == dtype else cast_once(x, dtype)
        terms = self._terms
        if self.rows is not None or (self._drops and any(d.dropout and d.training for d in self.deltas)):
            if self._drops and not dropout.supports(shared):
                return None
            terms = tuple(self._term(i, x) for i in range(len(terms)))
        factors = [p for d in self.deltas for p in d.factors()]
        y: Tensor = _apply(x, shared, bias_O, self.storage, found, terms, *factors)
        return y

    def _term(self, i: int, x: Tensor) -> Term:
        """Piece i in this call: the rows of [M, I] that it acts on, and a mask of its own."""
        delta = self.deltas[i]
        mask = dropout.draw(delta.dropout) if delta.dropout and delta.training else None
        return Term(self.columns[i], delta.scale, mask, self._slice(i, x))

    def _slice(self, i: int, x: Tensor) -> slice:
        """The rows of [M, I] that piece i acts on."""
        index = None if self.rows is None else self.rows[i].index
        if self.rows is None or index is None:
            return ALL
        each = x.numel() // x.shape[-1] // self.rows[i].total
        return slice(index[0] * each, (index[-1] + 1) * each)

    def _in_triton(self, x: Tensor, bias_O: Tensor | None, found: tuple[Saved, Any]) -> Tensor | None:
        """One piece on a GPU: its sum and its dropout happen inside the large products where that is faster.

        None where the weight has another dtype than x, as it may under autocast.
        """
        triton_lora = _triton_lora()
        delta = self.deltas[0]
        weight = triton_lora.frozen_weight(self.storage, *found)
        if not triton_lora.fits(x, weight):
            return None
        p = delta.dropout if delta.training else 0.0
        y: Tensor = triton_lora.lora_linear(x, weight, bias_O, *delta.factors(), delta.scale, p)
        return y

    def _without_grad(self, module: Any, x: Tensor) -> Tensor | None:
        """The frozen module's own output, bit for bit, and the pieces added to it in place."""
        if self._drops and any(d.dropout and d.training for d in self.deltas):
            return None
        y: Tensor = self._forward(module, x)
        if type(y) is not Tensor or not y.is_contiguous():
            return None
        x_MI, y_MO = _flat(x), _flat(y)
        if x_MI.dtype != y.dtype:
            x_MI = x_MI.to(y.dtype)
        if self._alone:
            A_RI, B_OR = self.deltas[0].factors()
            if A_RI.dtype is y.dtype:
                y_MO.addmm_(F.linear(x_MI, A_RI), B_OR.t(), alpha=self.deltas[0].scale)
                return y
        for A_RI, B_RO, scale, columns in self._products(y.dtype):
            add_product(y_MO, F.linear(x_MI, A_RI), B_RO, scale, columns)
        return y

    def _products(self, dtype: torch.dtype) -> Products:
        """A, Bᵀ, s and the columns of all pieces in this dtype, kept until a piece changes."""
        key = dtype, [versions(*d.masters()) for d in self.deltas]
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                made = []
                for delta, columns in zip(self.deltas, self.columns, strict=True):
                    A_RI, B_OR = delta.factors()
                    made.append((A_RI.detach().to(dtype), B_OR.detach().to(dtype).t(), delta.scale, columns))
            self._kept = key, tuple(made)
        return self._kept[1]

    def __reduce__(self) -> Any:
        return type(self), (self.deltas, self.columns, self.base, self.storage, self.rows)


@cache
def _triton_lora() -> Any:
    """The module, when there is a use for it: importing Triton takes long, an import statement in each call 1 µs."""
    from inlay.kernels import triton_lora

    return triton_lora


def usable(x: Tensor) -> bool:
    """Whether x is an ordinary tensor outside of functorch's transforms."""
    return (
        type(x) is Tensor and (x.is_cpu or x.is_cuda or x.is_meta) and not torch._C._are_functorch_transforms_active()
    )


def dtype_of(module: Any, x: Tensor, storage: Storage) -> torch.dtype | None:
    """What the projection computes in: the dtype of x, or autocast's; None where the plain form has its own way."""
    device = "cpu" if x.is_cpu else x.device.type
    if not _autocasts(device):
        dtype = x.dtype
        if not storage.packed:
            return dtype if dtype in _FLOATS and weight_of(module).dtype is dtype else None
    else:
        dtype = torch.get_autocast_dtype(device)
    fits = dtype in _FLOATS and getattr(module, "compute_dtype", dtype) in (None, dtype)
    return dtype if fits else None


def _autocasts(device: str) -> bool:
    # torch refuses the question for the meta device, on which costs are planned.
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """The operands have the dtype they shall have. Entering a context costs more than asking."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


class _Last(threading.local):
    source: weakref.ref[Tensor] | None = None
    copy: weakref.ref[Tensor] | None = None
    version = -1


_last = _Last()


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, detached; projections that read the same x one after another get the same copy."""
    kept = _last.copy() if _last.copy is not None else None
    same = _last.source is not None and _last.source() is x and _last.version == x._version
    if same and kept is not None and kept.dtype == dtype:
        return kept
    made = x.detach().to(dtype)
    _last.source, _last.copy, _last.version = weakref.ref(x), weakref.ref(made), x._version
    return made


def add_low_rank(x_MI: Tensor, A_RI: Tensor, B_OR: Tensor, term: Term, y_MO: Tensor) -> Tensor:
    """s = x̂ Aᵀ, after y += scale s Bᵀ in place."""
    if term.mask is not None:
        x_MI = dropout.apply(x_MI.contiguous(), term.mask)
    if lowrank.fits(x_MI, A_RI, B_OR):
        if term.columns is None:
            return lowrank.add_low_rank(x_MI, A_RI, B_OR, term.scale, y_MO)
        at = 0
        for lo, hi in term.columns:
            s_MR = lowrank.add_low_rank(x_MI, A_RI, B_OR[at : at + hi - lo], term.scale, y_MO[:, lo:hi])
            at += hi - lo
        return s_MR
    s_MR = x_MI.mm(_in(A_RI, x_MI.dtype).t())
    add_product(y_MO, s_MR, _in(B_OR, x_MI.dtype).t(), term.scale, term.columns)
    return s_MR


def add_product(y_MO: Tensor, s_MR: Tensor, B_RO: Tensor, scale: float, columns: Columns | None) -> None:
    """y += scale s Bᵀ in place, for the features in these ranges."""
    if columns is None:
        y_MO.addmm_(s_MR, B_RO, alpha=scale)
        return
    at = 0
    for lo, hi in columns:
        y_MO[:, lo:hi].addmm_(s_MR, B_RO[:, at : at + hi - lo], alpha=scale)
        at += hi - lo


def part(y_MO: Tensor, columns: Columns | None) -> Tensor:
    """The features in these ranges."""
    if columns is None:
        return y_MO
    parts = [y_MO[:, lo:hi] for lo, hi in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def factor_grads(
    dy_MO: Tensor, x_MI: Tensor, s_MR: Tensor, A_RI: Tensor, B_OR: Tensor, term: Term, dx_MI: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dA and dB of one piece, in the dtype of A and B; what it gives to dx is added in place."""
    dy_MO = part(dy_MO, term.columns)
    dropped = x_MI if term.mask is None else dropout.apply(x_MI.contiguous(), term.mask)
    if lowrank.fits(dy_MO, A_RI, B_OR):
        into = dx_MI if dx_MI is None or term.mask is None else torch.empty_like(dropped)
        grads = lowrank.factor_grads(dy_MO, dropped, s_MR, A_RI, B_OR, term.scale, into, add=into is dx_MI)
        if term.mask is not None and dx_MI is not None and into is not None:
            dropout.apply(into, term.mask, out=dx_MI)
        return grads
    if dy_MO.numel() < SMALL:
        dB_OR = dy_MO.t().mm(s_MR)
    else:
        # (sᵀ dy)ᵀ and not dyᵀ s: the short side first is a third faster.
        dB_OR = s_MR.t().mm(dy_MO).t()
    dB_OR = _in(dB_OR, B_OR.dtype).mul_(term.scale)
    ds_MR = dy_MO.mm(_in(B_OR, dy_MO.dtype)).mul_(term.scale)
    dA_RI = _in(ds_MR.t().mm(dropped), A_RI.dtype)
    if dx_MI is not None:
        if term.mask is None:
            dx_MI.addmm_(ds_MR, _in(A_RI, dx_MI.dtype))
        else:
            dropout.apply(torch.mm(ds_MR, _in(A_RI, dx_MI.dtype)), term.mask, out=dx_MI)
    return dA_RI, dB_OR


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking is cheaper than a conversion that does nothing.
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def widened(x: Tensor) -> Tensor:
    """x in the dtype in which its products are computed here."""
    return x.float() if gemm.emulated(x) else x


def _flat(x: Tensor) -> Tensor:
    """[M, I] of [..., I]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _LoRALinear(torch.autograd.Function):
    """x is the differentiable input, `shared` the same values in the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: Tensor,
        bias_O: Tensor | None,
        storage: Storage,
        found: tuple[Saved, Any],
        terms: tuple[Term, ...],
        *factors: Tensor,
    ) -> Tensor:
        saved, layout = found
        if _autocasts(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                y, lows = _forward(shared, bias_O, storage, saved, layout, terms, factors)
        else:
            y, lows = _forward(shared, bias_O, storage, saved, layout, terms, factors)
        ctx.save_for_backward(shared, *saved, *factors, *lows)
        ctx.storage, ctx.layout, ctx.terms = storage, layout, terms
        ctx.count, ctx.dtype = len(saved), x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if _autocasts(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _LoRALinear.backward(ctx, dy)
        # The check costs as much as a small product: only where a second derivative may be asked for.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _forward(
    x: Tensor,
    bias_O: Tensor | None,
    storage: Storage,
    saved: Saved,
    layout: Any,
    terms: tuple[Term, ...],
    factors: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor]]:
    """y and s. y is no view: models may go on in place, which autograd forbids on views made in a Function."""
    if gemm.emulated(x):
        y, lows = _forward(x.float(), bias_O, storage, saved, layout, terms, factors)
        return y.to(x.dtype), [s_MR.to(x.dtype) for s_MR in lows]
    y = storage.forward(x, saved, layout, bias_O)
    x_MI, y_MO = _flat(x), _flat(y)
    lows = []
    for i, term in enumerate(terms):
        x_part, y_part = (x_MI, y_MO) if term.rows is ALL else (x_MI[term.rows], y_MO[term.rows])
        lows.append(add_low_rank(x_part, factors[2 * i], factors[2 * i + 1], term, y_part))
    # Products of more than two dimensions with a bias, and packed ones, are views of their matrix.
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y, lows


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    shared, *rest = ctx.saved_tensors
    saved, rest = tuple(rest[: ctx.count]), rest[ctx.count :]
    terms: tuple[Term, ...] = ctx.terms
    x_MI, dy_MO = widened(_flat(shared)), widened(_flat(dy))
    dx_MI = ctx.storage.input_grad(dy_MO, saved, ctx.layout) if ctx.needs_input_grad[0] else None
    grads: list[Tensor | None] = []
    for i, term in enumerate(terms):
        A_RI, B_OR, s_MR = rest[2 * i], rest[2 * i + 1], _in(rest[2 * len(terms) + i], x_MI.dtype)
        if term.rows is ALL:
            grads += factor_grads(dy_MO, x_MI, s_MR, A_RI, B_OR, term, dx_MI)
        else:
            dx_part = None if dx_MI is None else dx_MI[term.rows]
            grads += factor_grads(dy_MO[term.rows], x_MI[term.rows], s_MR, A_RI, B_OR, term, dx_part)
    dx = None if dx_MI is None else _in(dx_MI.view(shared.shape), ctx.dtype)
    return dx, None, None, None, None, None, *grads


_backward_once = once_differentiable(_backward)

# What `_LoRALinear.apply` ends in, after it has looked for functorch's tensors, of which `usable` leaves none: 5 µs.
_apply: Any = super(torch.autograd.Function, _LoRALinear).apply
