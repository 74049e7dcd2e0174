"""Adaptive budget allocation: a rank for every projection, found during training.

Legend: B batch, T tokens, I / O features entering / leaving a site, R initial rank, K ranks kept at a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Columns, Site
from inlay.errors import MethodError
from inlay.methods.base import Delta, Frozen, Fused, Method, Piece
from inlay.methods.budget import Budget
from inlay.route import Rows

if TYPE_CHECKING:
    from inlay.adapter import Adapter

Span = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, lt=1.0)]


class AdaLoRADelta(Delta):
    """Δ(x) = s P (Λ * Q dropout(x)), with P of shape (O, R), Λ (R,) and Q (R, I).

    Stored are the triplets that were kept, at their places: P (O, K), Lambda (K,), Q (K, I) and `kept` (R,).
    """

    def __init__(self, site: Site, method: AdaLoRA) -> None:
        super().__init__()
        rank = method.init_rank
        # The reference code adds 1e-5 to the rank; s stays that of the initial rank whatever is pruned.
        self.scale, self.dropout = method.alpha / (rank + 1e-5), method.dropout
        self.P = nn.Parameter(torch.empty(site.out_features, rank, dtype=torch.float32).normal_(std=0.02))
        self.Lambda = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.Q = nn.Parameter(torch.empty(rank, site.in_features, dtype=torch.float32).normal_(std=0.02))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        for name in ("P", "Lambda", "Q"):
            for what in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{what}_{name}", torch.zeros_like(self.get_parameter(name)))

    kept: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        low_R = F.linear(x, self.Q.to(x.dtype)) * self.Lambda.to(x.dtype)
        return self.scale * F.linear(low_R, self.P.to(y.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """LoRA's A = Λ Q and B = P."""
        return self.Lambda[:, None] * self.Q, self.P

    def masters(self) -> tuple[Tensor, ...]:
        """What the factors are made of."""
        return self.P, self.Lambda, self.Q

    @classmethod
    def fused(
        cls,
        deltas: Sequence[Delta],
        columns: Sequence[Columns | None],
        base: type[nn.Module],
        rows: Sequence[Rows] | None = None,
    ) -> Fused | None:
        from inlay.kernels.lora import LoRALinear

        mine = [d for d in deltas if isinstance(d, AdaLoRADelta)]
        return LoRALinear.make(mine, columns, base, rows) if len(mine) == len(deltas) else None

    def weight_delta(self) -> Tensor:
        return self.scale * (self.P * self.Lambda) @ self.Q

    @property
    def rank(self) -> int:
        """K, the number of triplets in use."""
        return int(self._used().sum())

    def _used(self) -> Tensor:
        # Between two allocations the optimizer may revive a pruned triplet, which then acts.
        return self.kept | (self.Lambda.detach() != 0)

    def begin(self, total_steps: int) -> None:
        """Tells the budget how many optimizer steps the run has."""
        budget = self._modules.get("budget")
        if isinstance(budget, Budget):
            budget.begin(total_steps)

    def undecayed(self) -> set[str]:
        """All three: decay would shrink what the penalty keeps near orthogonal, and Λ, by which triplets compete."""
        return {"P", "Lambda", "Q"}

    def stored(self) -> dict[str, Tensor]:
        used = self._used()
        P, Lambda, Q = self.P.detach(), self.Lambda.detach(), self.Q.detach()
        if not used.is_meta:
            P, Lambda, Q = P[:, used], Lambda[used], Q[used]
        return {"P": P, "Lambda": Lambda, "Q": Q, "kept": used}

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave; pruned triplets have Λ = 0 and keep the fresh P and Q they were built with."""
        kept = tensors["kept"].to(self.kept.device)
        ranks = {int(kept.sum()), *(tensors[n].shape[d] for n, d in (("P", 1), ("Lambda", 0), ("Q", 0)))}
        if len(ranks) > 1:
            raise MethodError(f"a stored AdaLoRA piece contradicts itself about its rank: {sorted(ranks)}.")
        with torch.no_grad():
            self.kept.copy_(kept)
            self.P[:, kept] = tensors["P"].to(self.P)
            self.Lambda.zero_()
            self.Lambda[kept] = tensors["Lambda"].to(self.Lambda)
            self.Q[kept] = tensors["Q"].to(self.Q)

    def stored_spec(self) -> dict[str, torch.Size]:
        rank = self.kept.numel()
        shapes = {"P": (self.P.shape[0], -1), "Lambda": (-1,), "Q": (-1, self.Q.shape[1]), "kept": (rank,)}
        return {name: torch.Size(shape) for name, shape in shapes.items()}


class AdaLoRA(Method):
    r"""Adaptive low-rank adaptation: W x + s P Λ Q x, where the triplets (P_i, Λ_i, Q_i) compete for a global budget.

    Zhang et al. 2023, arXiv:2303.10512. P and Q are kept near orthogonal by a penalty, so that Λ behaves like singular
    values. After each optimizer step t every entry w of P, Λ, Q has its sensitivity I = |w ∇w| smoothed,

        Ī ← β1 Ī + (1 - β1) I,   Ū ← β2 Ū + (1 - β2) |I - Ī|,   s(w) = Ī Ū,   S_i = s(Λ_i) + mean s(P_i) + mean s(Q_i)

    and every `interval` steps all but the b(t) triplets of highest S, over all sites together, get Λ_i = 0. Their
    vectors stay and may come back. b falls from the initial to the target budget by a cubic between `warmup` and the
    last `final` steps, in which the choice is fixed. (The paper's equation 14 has t - ti - tf in the numerator, which
    would start above the initial budget; its code, and we, have t - ti.)

    It drives itself: hooks on the optimizer add the penalty's gradient before a step and allocate after it, once a step
    whatever the loop. Weight decay on P, Λ and Q works against it: inlay's trainer leaves them out of it; elsewhere set
    it to zero.

    Trained parameters: init_rank (I + O + 1) for each projection.

    Attributes:
        target_rank: average rank of a site at the end.
        init_rank: R, the rank at the start; the paper takes 1.5 target_rank.
        alpha: s = alpha / init_rank, and stays so.
        dropout: probability of zeroing an input feature of Q during training.
        total_steps: optimizer steps of the run. None leaves it to the trainer, or to `set_total_steps`.
        warmup: steps before the budget falls (an integer), or a share of all steps (below 1).
        final: steps at the end with a fixed choice, or a share of all steps.
        interval: steps between two allocations while the budget falls.
        beta1, beta2: of the two averages.
        orthogonality: γ, the weight of the penalty: γ mean ‖PᵀP - 1‖ over all P and Q. The paper uses 0.1 to 0.5.
        follow: "code" scores |w ∇w| with w after the step, as the authors' trainer does, and has the penalty above;
            "paper" (Algorithm 1, equation 4) has w before the step, and γ Σ ‖PᵀP - 1‖².
        sites: what to adapt.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "adalora"
    citation: ClassVar[str] = """
        @inproceedings{zhang2023adalora,
          title={AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning},
          author={Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and Karampatziakis, Nikos and
                  He, Pengcheng and Cheng, Yu and Chen, Weizhu and Zhao, Tuo},
          booktitle={ICLR},
          eprint={2303.10512},
          year={2023}
        }"""

    target_rank: int = Field(default=8, ge=0)
    init_rank: int = Field(default=12, ge=1)
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    total_steps: int | None = Field(default=None, ge=1)
    warmup: Span = 0.1
    final: Span = 0.3
    interval: int = Field(default=10, ge=1)
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    orthogonality: float = Field(default=0.1, ge=0.0)
    follow: Literal["code", "paper"] = "code"
    sites: str | tuple[str, ...] = "linear"
    layers: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _ranks(self) -> AdaLoRA:
        if self.target_rank > self.init_rank:
            raise ValueError(f"target_rank={self.target_rank} is more than init_rank={self.init_rank}")
        return self

    def select(self, anatomy: Anatomy) -> list[Site]:
        sites = anatomy.select(self.sites, self.layers, kinds=("linear",))
        wrong = [s for s in sites if s.kind != "linear" or s.tap != "output"]
        if wrong:
            raise MethodError(
                f"AdaLoRA adapts what leaves a projection; {wrong[0].name!r} at {wrong[0].leave} is not that. Name "
                "projections, for example sites=('attn.q', 'ffn.up')."
            )
        return sites

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        return AdaLoRADelta(site, self)

    def finish(self, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """One budget for all sites; its state is kept with the first."""
        own = tuple(p for _, p in pieces if isinstance(p, AdaLoRADelta))
        own[0].add_module("budget", Budget(own, self))


def budget_of(adapter: Adapter) -> Budget:
    """The budget of an AdaLoRA adapter (the first, where several are mixed).

    Raises:
        MethodError: the adapter has none.
    """
    for piece in adapter.pieces.values():
        for module in piece.modules():
            if isinstance(module, Budget):
                return module
    raise MethodError(f"{adapter!r} has no AdaLoRA part, so it has no budget.")


def set_total_steps(adapter: Adapter, total_steps: int) -> None:
    """Tells an AdaLoRA adapter how many optimizer steps its training will have; inlay's own trainer does it itself.

    Raises:
        MethodError: the adapter has no AdaLoRA part, or warm-up and final phase leave no step between them.
    """
    budget_of(adapter).begin(total_steps)


def ranks(adapter: Adapter) -> dict[str, int]:
    """The rank that each site has now, by the name of its piece.

    Raises:
        MethodError: the adapter has no AdaLoRA part.
    """
    budget_of(adapter)
    return {key: piece.rank for key, piece in adapter.pieces.items() if isinstance(piece, AdaLoRADelta)}


def rank_map(adapter: Adapter, path: str | None = None) -> Any:
    """The ranks as a picture: blocks by kind of projection (the paper's figure 3).

    Args:
        adapter: an AdaLoRA adapter.
        path: write a PNG (or PDF, SVG: by suffix) there.

    Returns:
        A matplotlib figure.
    """
    from inlay.heatmap import by_layer, heatmap

    found = ranks(adapter)
    sites = [s for key, s in zip(adapter.pieces, adapter.sites, strict=True) if key in found]
    rows, columns, values = by_layer(adapter.model, sites, list(found.values()))
    return heatmap(rows, columns, values, title="Rank that AdaLoRA gave each projection", unit="rank", path=path)
