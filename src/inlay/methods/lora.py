"""Low-rank adaptation of projections and embeddings.

Legend: B batch, T tokens, I / O features entering / leaving a site, R rank, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import AllowInfNan, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Columns, Site
from inlay.anatomy.roles import roles
from inlay.errors import MethodError
from inlay.methods.base import Delta, Frozen, Fused, Method, Rowwise
from inlay.route import Rows

if TYPE_CHECKING:
    from inlay.adapter import Adapter

Init = Literal["kaiming", "gaussian"]


class LoRADelta(Delta):
    """Δ(x) = s B A dropout(x), with A of shape (R, I) and B of shape (O, R)."""

    raised = ("B",)

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, init: Init) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A, self.B = factors(site, rank, init)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(y.dtype))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        s = F.linear(x, self.A.to(x.dtype))
        if s.dtype != y.dtype:
            return y + (self.scale * F.linear(s, self.B.to(s.dtype))).to(y.dtype)
        # One addmm in place of product, scaling and sum: two passes over y instead of six.
        flat = torch.addmm(
            y.reshape(-1, y.shape[-1]), s.reshape(-1, s.shape[-1]), self.B.to(y.dtype).mT, alpha=self.scale
        )
        return flat.view(y.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.A, self.B

    masters = factors

    @classmethod
    def together(cls, deltas: Sequence[Delta], index: Sequence[int]) -> Rowwise | None:
        from inlay.kernels.lora_rows import LoRARows

        mine = [d for d in deltas if isinstance(d, LoRADelta)]
        return LoRARows(mine, index) if len(mine) == len(deltas) else None

    @classmethod
    def fused(
        cls,
        deltas: Sequence[Delta],
        columns: Sequence[Columns | None],
        base: type[nn.Module],
        rows: Sequence[Rows] | None = None,
    ) -> Fused | None:
        from inlay.kernels.lora import LoRALinear

        mine = [d for d in deltas if isinstance(d, LoRADelta)]
        return LoRALinear.make(mine, columns, base, rows) if len(mine) == len(deltas) else None

    def weight_delta(self) -> Tensor:
        return self.scale * (self.B @ self.A)


class EmbeddingLoRADelta(Delta):
    """Δ(ids) = s c B A[:, ids], with A of shape (R, V) and B of shape (O, R).

    c is 1, or what the embedding multiplies its rows by (Gemma).
    """

    def __init__(self, site: Site, frozen: Frozen, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.output_scale = scale, frozen.output_scale
        self.A, self.B = embedding_factors(site, rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = F.embedding(x, self.A.mT).to(y.dtype)
        return self.scale * self.output_scale * F.linear(rows, self.B.to(y.dtype))

    def weight_delta(self) -> Tensor:
        return self.scale * (self.B @ self.A)


def factors(site: Site, rank: int, init: Init) -> tuple[nn.Parameter, nn.Parameter]:
    """A of shape (R, I), random, and B of shape (O, R), zero: fp32."""
    A = torch.empty(rank, site.in_features, dtype=torch.float32)
    if init == "kaiming":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    else:
        nn.init.normal_(A, std=1 / rank)
    return nn.Parameter(A), nn.Parameter(torch.zeros(site.out_features, rank, dtype=torch.float32))


def embedding_factors(site: Site, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A of shape (R, V) and B of shape (O, R): fp32.

    As in the reference code, zeros stand in A here: the rows of ids that never occur then stay exactly zero.
    """
    A = torch.zeros(rank, site.in_features, dtype=torch.float32)
    return nn.Parameter(A), nn.Parameter(torch.randn(site.out_features, rank, dtype=torch.float32))


Alpha = Annotated[PositiveFloat, AllowInfNan(False)]


class LowRank(Method):
    """What LoRA and DoRA share: rank, alpha and dropout at each chosen site."""

    rank: PositiveInt | dict[str, PositiveInt] = 8
    alpha: Alpha | dict[str, Alpha] = 16.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    rslora: bool = False
    init: Init = "kaiming"
    sites: str | tuple[str, ...] = "linear"
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        sites = anatomy.select(self.sites, self.layers, kinds=("linear", "embedding"))
        wrong = [s for s in sites if s.kind not in ("linear", "embedding") or s.tap != "output"]
        if wrong:
            raise MethodError(
                f"{type(self).__name__} adapts what leaves a projection or an embedding; {wrong[0].name!r} at "
                f"{wrong[0].leave} is not that. Name projections, for example sites=('attn.q', 'ffn.up')."
            )
        if isinstance(self.rank, dict) or isinstance(self.alpha, dict):
            known = roles(anatomy)
            sites = [dataclasses.replace(s, name=known.get((s.leave, s.columns), s.name)) for s in sites]
        for pattern in (self.rank, self.alpha):
            _check_mapping(pattern, sites, self.sites)
        return sites

    def rank_of(self, site: Site) -> int:
        """The rank at one site."""
        return _pick(self.rank, site, 8)

    def scale_of(self, site: Site) -> float:
        """s at one site: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha, rank = _pick(self.alpha, site, 16.0), self.rank_of(site)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class LoRA(LowRank):
    r"""Low-rank adaptation: h = W x + s B A x.

    s = alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). Hu et al. 2021,
    arXiv:2106.09685, section 4.1, write A as Gaussian; their code uses kaiming_uniform(a=sqrt(5)), and so do we unless
    `init="gaussian"` is given. B starts at zero, so the output is unchanged at the start, bit for bit. The paper adapts
    attention only; all linear layers are the better default (QLoRA, section 4), so `sites="linear"`.

    Trained parameters: rank (I + O) for each projection. A projection that is one of several in a fused leaf
    (GPT-2's `c_attn`) gets a rank of its own, as in the reference code; PEFT shares one A among them.

    Attributes:
        rank: R. A mapping gives each site the rank of the longest key that names it, {"ffn": 4, "default": 8}: a key is
            a semantic name or its beginning, or the end of a module path.
        alpha: the numerator of s; a mapping as for rank.
        dropout: probability of zeroing an input feature of A during training; what the frozen weight reads is never
            dropped. Embeddings have none, as in the reference code: they are read by index.
        rslora: scale by 1 / sqrt(rank) instead of 1 / rank; keeps the step size steady at high rank.
        init: "kaiming" as the reference code, "gaussian" with standard deviation 1 / rank.
        sites: what to adapt; see `inlay.anatomy`. `("linear", "embed")` adapts the token embedding too. Where the
            output layer shares the embedding's weight, each use has its own delta; the shared weight stays frozen.
        layers: only these blocks, negative numbers from the end; backward stops below the lowest.
    """

    tag: ClassVar[str] = "lora"
    citation: ClassVar[str] = """
        @inproceedings{hu2022lora,
          title={LoRA: Low-Rank Adaptation of Large Language Models},
          author={Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and
                  Wang, Shean and Wang, Lu and Chen, Weizhu},
          booktitle={ICLR},
          eprint={2106.09685},
          year={2022}
        }"""

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        if site.kind == "embedding":
            return EmbeddingLoRADelta(site, frozen, self.rank_of(site), self.scale_of(site))
        return LoRADelta(site, self.rank_of(site), self.scale_of(site), self.dropout, self.init)


def param_groups(adapter: Adapter, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+ optimizer groups: lr(B) = ratio · lr(A) (Hayou et al. 2024, arXiv:2402.12354).

    The B of every projection is raised, LoRA's and DoRA's. That of an embedding is not: there A starts at zero.

    Args:
        adapter: an adapter with low-rank pieces; its other parameters get `lr`.
        lr: the learning rate of A.
        ratio: the paper's λ; 16 is its recommendation.

    Returns:
        Groups for any optimizer: `AdamW(param_groups(adapter, 2e-4))`.

    Raises:
        MethodError: there is no B.
    """
    raised = {
        id(module.get_parameter(name))
        for piece in adapter.pieces.values()
        for module in piece.modules()
        for name in getattr(module, "raised", ())
    }
    if not raised:
        raise MethodError(f"LoRA+ raises the learning rate of B, and {adapter!r} has no such matrix. Use one for all.")
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) not in raised], "lr": lr},
        {"params": [p for p in parameters if id(p) in raised], "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]


def _check_mapping(pattern: object, sites: list[Site], chosen: object) -> None:
    for key in pattern if isinstance(pattern, dict) else ():
        if key != "default" and not any(_matches(key, s) for s in sites):
            raise MethodError(f"{key!r} in a rank or alpha mapping matches none of the chosen sites {chosen!r}.")


def _matches(key: str, site: Site) -> bool:
    return (
        site.name == key or site.name.startswith(key + ".") or site.leave.endswith(key) or key in site.leave.split(".")
    )


N = TypeVar("N", int, float)


def _pick(value: N | dict[str, N], site: Site, default: N) -> N:
    if not isinstance(value, dict):
        return value
    fitting = [k for k in value if k != "default" and _matches(k, site)]
    return value[max(fitting, key=len)] if fitting else value.get("default", default)
