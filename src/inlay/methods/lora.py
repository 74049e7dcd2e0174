"""Low-rank adaptation of projections and embeddings.

Legend: B batch, T tokens, I / O features entering / leaving a site, R rank.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Delta, Frozen, Method


class LoRADelta(Delta):
    """Δ(x) = s B A dropout(x), with A of shape (R, I) and B of shape (O, R)."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, init: str) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.empty(rank, site.in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank, dtype=torch.float32))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=1 / rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.linear(self._down(x), self.B.to(y.dtype))

    def _down(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(x, self.A.to(x.dtype))

    def weight_delta(self) -> Tensor:
        return self.scale * (self.B @ self.A)


class EmbeddingLoRADelta(Delta):
    """Δ(ids) = s B A[:, ids], with A of shape (R, V) and B of shape (O, R), V the vocabulary."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        # As in the reference code: zeros stand in A here, not in B, so that the table of V columns starts sparse.
        self.A = nn.Parameter(torch.zeros(rank, site.in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.randn(site.out_features, rank, dtype=torch.float32))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = F.embedding(x, self.A.mT)
        return self.scale * F.linear(rows.to(y.dtype), self.B.to(y.dtype))

    def weight_delta(self) -> Tensor:
        return self.scale * (self.B @ self.A)


class LoRA(Method):
    r"""Low-rank adaptation: h = W x + s B A x.

    s = alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). Hu et al. 2021,
    arXiv:2106.09685, section 4.1, write A as Gaussian; their code uses kaiming_uniform(a=sqrt(5)), and so do we unless
    `init="gaussian"` is given. B starts at zero, so the output is unchanged at the start, bit for bit. The paper adapts
    attention only; all linear layers are the better default (QLoRA, section 4), so `sites="linear"`.

    Trained parameters: rank (I + O) for each projection. A projection that is one of several in a fused leaf
    (GPT-2's `c_attn`) gets a rank of its own.

    Attributes:
        rank: R. A mapping gives other ranks to the sites its keys select: {"ffn": 4, "default": 8}.
        alpha: the numerator of s; a mapping as for rank.
        dropout: probability of zeroing an input feature of A during training.
        rslora: scale by 1 / sqrt(rank) instead of 1 / rank; keeps the step size steady at high rank.
        init: "kaiming" as the reference code, "gaussian" with standard deviation 1 / rank.
        sites: what to adapt; see `inlay.anatomy`.
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

    rank: int | dict[str, int] = 8
    alpha: float | dict[str, float] = 16.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"
    sites: str | tuple[str, ...] = "linear"
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        sites = anatomy.select(self.sites, self.layers, kinds=("linear", "embedding"))
        wrong = [s.leave for s in sites if s.kind not in ("linear", "embedding")]
        if wrong:
            raise MethodError(f"{type(self).__name__} adapts projections and embeddings; {wrong[0]} is neither.")
        for pattern in (self.rank, self.alpha):
            self._check_pattern(pattern, sites)
        return sites

    def _check_pattern(self, pattern: object, sites: list[Site]) -> None:
        for key in pattern if isinstance(pattern, dict) else ():
            if key != "default" and not any(_matches(key, s) for s in sites):
                raise MethodError(
                    f"{key!r} in a rank or alpha mapping matches none of the chosen sites {self.sites!r}."
                )

    def rank_of(self, site: Site) -> int:
        """The rank at one site.

        Raises:
            MethodError: a rank below 1.
        """
        rank = _pick(self.rank, site, 8)
        if rank < 1:
            raise MethodError(f"rank must be at least 1, not {rank} (site {site.leave}).")
        return rank

    def scale_of(self, site: Site) -> float:
        """s at one site."""
        rank = self.rank_of(site)
        return _pick(self.alpha, site, 16.0) / (math.sqrt(rank) if self.rslora else rank)

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        if site.kind == "embedding":
            return EmbeddingLoRADelta(site, self.rank_of(site), self.scale_of(site))
        return LoRADelta(site, self.rank_of(site), self.scale_of(site), self.dropout, self.init)


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
