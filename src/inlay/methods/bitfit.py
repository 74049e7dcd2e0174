"""BitFit: only biases are trained.

Legend: B batch, T tokens, O features leaving a site.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Delta, Frozen, Method


class BiasDelta(Delta):
    """Δ = b, one value per output feature."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(site.out_features, dtype=torch.float32))
        self.frozen_bias = site.has_bias

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b.to(y.dtype).expand_as(y)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b.to(y.dtype)

    def weight_delta(self) -> Tensor:
        return torch.zeros((), device=self.b.device)

    def bias_delta(self) -> Tensor:
        return self.b


class BitFit(Method):
    r"""Bias-term fine-tuning: y = f(x) + b0 + b, and only b is trained (Ben Zaken et al. 2022, arXiv:2106.10199).

    The pretrained bias b0 stays frozen and b starts at zero: the same functions as training the bias itself, but
    removable, mixable in a batch and mergeable. Weight decay, if any, therefore pulls towards the pretrained bias,
    where the reference code pulls towards zero. Biases of LayerNorms count, as in the reference code.

    Trained parameters on BERT: 11 d L + 2 d = 102,912 for base (0.09 %), 272,384 for large (0.08 %).

    Attributes:
        sites: whose biases; by default all of the base model. `("attn.q", "ffn.up")` is the paper's subset of query and
            intermediate biases.
        add_missing: also add a zero-initialised bias where a named site has none. Off by default: models such as Llama
            and T5 have no biases at all, and what is then trained is a new parameter, not the published method.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "bitfit"
    citation: ClassVar[str] = """
        @inproceedings{benzaken2022bitfit,
          title={BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models},
          author={Ben Zaken, Elad and Goldberg, Yoav and Ravfogel, Shauli},
          booktitle={ACL},
          eprint={2106.10199},
          year={2022}
        }"""

    sites: str | tuple[str, ...] | None = None
    add_missing: bool = False
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        sites = anatomy.select(("*",) if self.sites is None else self.sites, self.layers)
        if self.sites is None:
            outside = {*anatomy.head, anatomy.output}
            sites = [s for s in sites if s.leave not in outside and s.kind != "embedding"]
            if self.add_missing:
                sites = [s for s in sites if s.kind == "linear"]
        biased = [s for s in sites if s.has_bias]
        if self.add_missing:
            return sites
        if not biased:
            raise MethodError(
                f"BitFit trains biases, and {anatomy.model} has none"
                + ("" if self.sites is None else f" at {self.sites!r}")
                + ". Choose another method, or add zero-initialised ones with BitFit(add_missing=True)."
            )
        return biased

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        return BiasDelta(site)
