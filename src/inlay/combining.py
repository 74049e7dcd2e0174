"""Combining trained adapters: ΔW = Σ w_i ΔW_i as one new adapter, with the error that it introduces.

"concat" is exact: the ranks of the factors add up. "svd" keeps the best approximation of a given rank (Eckart-Young).
"linear" adds the factors themselves, (Σ √w_i B_i) (Σ √w_i A_i), as is often done; its cross terms are an error, which
is measured. Weights may be negative: task arithmetic (Ilharco et al. 2023, arXiv:2212.04089).

Legend: R rank, I / O features of a site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inlay.anatomy import anatomy
from inlay.anatomy.base import Columns, Site
from inlay.build import HEAD
from inlay.errors import AdapterError, MergeError, nearest
from inlay.merge import original
from inlay.methods.adalora import AdaLoRADelta
from inlay.methods.base import Delta, Method, Mix, Piece
from inlay.methods.full import Copy
from inlay.methods.lora import EmbeddingLoRADelta, LoRA, LoRADelta
from inlay.quant.bridge import weight_of
from inlay.spelling import mapping, spell
from inlay.state import known_name, require

if TYPE_CHECKING:
    from inlay.adapter import Adapter

How = Literal["concat", "svd", "linear"]
Place = tuple[str, Columns | None]


@dataclass(frozen=True)
class CombineReport:
    """How far the combination is from the sum that was asked for: ‖ΔW − Σ w_i ΔW_i‖ and ‖Σ w_i ΔW_i‖, by site.

    Attributes:
        how: what was done.
        ranks, errors, sizes: the rank, the Frobenius norm of the error and that of the sum, by module.
    """

    how: str
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The error relative to the sum, over all sites together."""
        size = math.hypot(*self.sizes.values())
        return math.hypot(*self.errors.values()) / size if size else 0.0

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"combined by {self.how} at {len(self.ranks)} sites, {shown}: error {self.ratio:.2%} of the sum"]
        worst = sorted(self.errors, key=lambda p: -self.errors[p] / (self.sizes[p] or 1.0))[:3]
        lines += [f"  {p}  {self.errors[p] / (self.sizes[p] or 1.0):.2%}" for p in worst if self.ratio > 1e-6]
        return "\n".join(lines)


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    how: How = "concat",
    rank: int | None = None,
    *,
    head: str | None = None,
) -> tuple[Adapter, CombineReport]:
    """Attaches the weighted sum of adapters as a new LoRA adapter, which becomes the active one.

    Args:
        model: a model with the adapters.
        weights: adapter names and their weights; negative ones subtract.
        name: how to call the new adapter.
        how: "concat" (exact, ranks add up), "svd" (the best of rank `rank`), "linear" (sums of the factors; all ranks
            must be equal).
        rank: for "svd"; by default the largest rank that any of them has at a site.
        head: whose trained task head the new adapter takes a copy of, where some have one.

    Returns:
        The new adapter, and the error that the combination introduced.

    Raises:
        MergeError: an adapter is not linear, has no low-rank factors where these are needed, or changes biases; the
            message lists all sites.
        AdapterError: an unknown adapter or name, or adapters with heads and no `head`.
    """
    from inlay.adapter import attach

    state = require(model)
    if how not in ("concat", "svd", "linear"):
        raise AdapterError(f"how={how!r} is not known: {nearest(str(how), ('concat', 'svd', 'linear'))}")
    if not weights or not isinstance(weights, Mapping):
        raise AdapterError("combine() needs at least one adapter with its weight, for example {'a': 0.7, 'b': -0.3}.")
    for each, weight in weights.items():
        known_name(state, each)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise AdapterError(
                f"the weight of {each!r} is {weight!r}; a weight is a finite number, negative to subtract."
            )
    if rank is not None and (how != "svd" or rank < 1):
        raise AdapterError("rank= is for how='svd', and at least 1; 'concat' adds the ranks up, 'linear' keeps them.")
    _check_head(state.adapters, weights, head)
    report = CombineReport(how)
    with torch.no_grad():
        terms = _terms(model, state.adapters, weights, how)
        results = {place: _reduce(place, group, how, rank, report) for place, group in terms.items()}
    sites = {place: group[0].site for place, group in terms.items()}
    method = _method(model, sites, {place: A.shape[0] for place, (A, _) in results.items()})
    heads = _heads(state.adapters[head]) if head is not None else []
    before = state.groups, state.batch
    adapter = attach(model, method, name, head=[s.leave for s, _ in heads] or None)
    try:
        for piece, site in zip(adapter.pieces.values(), adapter.sites, strict=True):
            if isinstance(piece, LoRADelta | EmbeddingLoRADelta):
                A, B = results[site.leave, site.columns]
                piece.load_stored({"A": A, "B": B})
        for key, copied in zip([k for k in adapter.pieces if k.endswith(f".{HEAD}")], heads, strict=True):
            adapter.pieces[key].load_stored(copied[1].stored())
    except BaseException:
        adapter.detach()
        state.activate(*before)
        raise
    return adapter, report


@dataclass(frozen=True)
class Term:
    """One adapter's ΔW at one place, as factors (B, A) or as a whole."""

    site: Site
    weight: float
    factors: tuple[Tensor, Tensor] | None = None
    dense: Tensor | None = None


def _terms(
    model: nn.Module, adapters: dict[str, Adapter], weights: Mapping[str, float], how: str
) -> dict[Place, list[Term]]:
    found: dict[Place, list[Term]] = {}
    problems = []
    for name, weight in weights.items():
        adapter = adapters[name]
        for key, piece, site in zip(adapter.pieces, adapter.pieces.values(), adapter.sites, strict=True):
            if isinstance(piece, Copy) and key.endswith(f".{HEAD}"):
                continue
            try:
                term = _term(model, piece, site, weight, how)
            except MergeError as error:
                problems.append(f"{name}: {key} ({type(piece).__name__}): {error}")
                continue
            found.setdefault((site.leave, site.columns), []).append(term)
    if problems:
        raise MergeError("these cannot be combined:\n  " + "\n  ".join(problems))
    if not found:
        raise MergeError(f"the adapters {list(weights)} have nothing but heads, so there is nothing to combine.")
    return found


def _term(model: nn.Module, piece: Piece, site: Site, weight: float, how: str) -> Term:
    if isinstance(piece, LoRADelta | EmbeddingLoRADelta):
        root = math.sqrt(piece.scale)
        return Term(site, weight, (root * piece.B.double(), root * piece.A.double()))
    if isinstance(piece, AdaLoRADelta):
        used, root = piece.Lambda != 0, math.sqrt(piece.scale)
        P = (piece.P * piece.Lambda)[:, used]
        return Term(site, weight, (root * P.double(), root * piece.Q[used].double()))
    if not isinstance(piece, Delta) or site.tap == "through" or site.enter != site.leave:
        raise MergeError("it is no change of one weight")
    if how != "svd":
        raise MergeError("it has no low-rank factors; how='svd' approximates its change of the weight")
    module = model.get_submodule(site.leave)
    if original(model, site.leave, "weight") is not module._parameters.get("weight"):
        raise MergeError("the weight it changes holds a merged adapter; unmerge first")
    whole = weight_of(module).float()
    rows = torch.cat([torch.arange(lo, hi) for lo, hi in site.columns]) if site.columns else slice(None)
    bias: Any = module._parameters.get("bias")
    old_b = None if bias is None else bias.float()[rows]
    fold = piece.fold_input if site.tap == "input" else piece.fold
    new_w, new_b = fold(whole[rows], old_b)
    if new_b is not None and (old_b is None or not torch.equal(new_b, old_b)):
        raise MergeError("it changes the bias, which low-rank factors cannot")
    output = dataclasses.replace(site, tap="output", in_features=whole.shape[1], out_features=new_w.shape[0])
    return Term(output, weight, dense=(new_w - whole[rows]).double())


def _reduce(
    place: Place, group: list[Term], how: str, rank: int | None, report: CombineReport
) -> tuple[Tensor, Tensor]:
    """A_RI and B_OR of the combination at one place, with scale 1."""
    path = place[0] if place[1] is None else f"{place[0]}{list(place[1])}"
    factored = [(t.weight, *t.factors) for t in group if t.factors is not None]
    if how == "linear":
        ranks = {B.shape[1] for _, B, _ in factored}
        if len(ranks) > 1:
            raise MergeError(f"how='linear' adds factors, and at {path} their ranks are {sorted(ranks)}. Use 'concat'.")
    site = group[0].site
    # An empty pair comes first, so that the others need not be there.
    B_all = torch.cat([torch.zeros(site.out_features, 0).double(), *(w * B.cpu() for w, B, _ in factored)], dim=1)
    A_all = torch.cat([torch.zeros(0, site.in_features).double(), *(A.cpu() for _, _, A in factored)])
    dense = [t.weight * t.dense.cpu() for t in group if t.dense is not None]
    if how == "concat":
        A, B, error, size = A_all, B_all, 0.0, _norm(B_all, A_all)
    elif how == "linear":
        A = sum((math.sqrt(abs(w)) * A.cpu() for w, _, A in factored), torch.zeros(()))
        B = sum((math.copysign(math.sqrt(abs(w)), w) * B.cpu() for w, B, _ in factored), torch.zeros(()))
        size = _norm(B_all, A_all)
        error = _norm(torch.cat([B, -B_all], dim=1), torch.cat([A, A_all]))
    else:
        most = rank or max([B.shape[1] for _, B, _ in factored], default=8)
        A, B, error, size = _truncated(B_all, A_all, dense, most)
    if not len(A):
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    report.ranks[path], report.errors[path], report.sizes[path] = A.shape[0], error, size
    return A.float(), B.float()


def _norm(B: Tensor, A: Tensor) -> float:
    """‖B A‖ without forming it: tr((BᵀB)(AAᵀ))."""
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def _truncated(B: Tensor, A: Tensor, dense: list[Tensor], rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of B A + Σ dense of a given rank, as factors that share the singular values evenly."""
    if not dense:
        q_b, r_b = torch.linalg.qr(B)
        q_a, r_a = torch.linalg.qr(A.T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        u, vt = q_b @ u, vt @ q_a.T
    else:
        u, s, vt = torch.linalg.svd(B @ A + sum(dense), full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    new_A, new_B = root[:, None] * vt[:kept], u[:, :kept] * root
    if kept < rank:
        new_A = torch.cat([new_A, new_A.new_zeros(rank - kept, new_A.shape[1])])
        new_B = torch.cat([new_B, new_B.new_zeros(new_B.shape[0], rank - kept)], dim=1)
    return new_A, new_B, float(s[kept:].norm()), float(s.norm())


def _method(model: nn.Module, sites: dict[Place, Site], ranks: dict[Place, int]) -> Method:
    """LoRA at exactly these places with these ranks and scale 1. Parts of fused modules are a part of the mix each."""
    found = anatomy(model)
    whole = {leave: rank for (leave, columns), rank in ranks.items() if columns is None}
    methods: list[Method] = []
    if whole:
        rank = mapping(whole)
        alpha = {k: float(r) for k, r in rank.items()} if isinstance(rank, dict) else float(rank)
        methods.append(LoRA(rank=rank, alpha=alpha, sites=spell(found, whole)))
    parts: dict[tuple[str, int], list[int]] = {}
    for place, site in sites.items():
        if place[1] is not None:
            assert site.layer is not None
            selector = f"{site.stack}:{site.name}" if site.stack else site.name
            parts.setdefault((selector, ranks[place]), []).append(site.layer)
    for (selector, rank), layers in sorted(parts.items()):
        methods.append(LoRA(rank=rank, alpha=float(rank), sites=selector, layers=tuple(sorted(layers))))
    return methods[0] if len(methods) == 1 else Mix(methods=tuple(methods))


def _heads(adapter: Adapter) -> list[tuple[Site, Piece]]:
    return [
        (site, piece)
        for key, piece, site in zip(adapter.pieces, adapter.pieces.values(), adapter.sites, strict=True)
        if isinstance(piece, Copy) and key.endswith(f".{HEAD}")
    ]


def _check_head(adapters: dict[str, Adapter], weights: Mapping[str, float], head: str | None) -> None:
    having = [name for name in weights if _heads(adapters[name])]
    if head is not None and head not in having:
        raise AdapterError(
            f"head={head!r} is none of the combined adapters with a trained head: {having or 'none has one'}"
        )
    if having and head is None:
        raise AdapterError(
            f"{having} have trained heads, and heads cannot be added up. Say whose to take, for example "
            f"head={having[0]!r}."
        )
