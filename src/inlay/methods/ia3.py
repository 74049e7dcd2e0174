"""IA3: keys, values and inner activations are rescaled by learned vectors.

Legend: B batch, T tokens, I / O features entering / leaving a site.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MergeError, MethodError, SiteError
from inlay.methods.base import Delta, Frozen, Method

SITES = ("attn.k", "attn.v", "cross.k", "cross.v", "ffn.down:input")


class ScaleDelta(Delta):
    """Δ = (l - 1) * y, so that y + Δ = l * y, with l of shape (O,). The bias of the module is rescaled with it."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.out_features, dtype=torch.float32))

    # l - 1 is small and keeps its digits in bf16, where l itself would be rounded to steps of 2^-7.
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.l - 1).to(y.dtype) * y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if y.dtype.itemsize >= self.l.dtype.itemsize:
            return y * self.l.to(y.dtype)  # two passes less over the gradient
        return torch.addcmul(y, (self.l - 1).to(y.dtype), y)

    def weight_delta(self) -> Tensor:
        raise MergeError("IA3 rescales a weight: ΔW depends on it. Ask fold() or fold_input() for the rescaled weight.")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of W, and the bias, times l."""
        l_O = self.l.to(weight)
        return weight * l_O[:, None], None if bias is None else bias * l_O

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns of W times l."""
        return weight * self.l.to(weight), bias


class IA3(Method):
    r"""Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638).

    k ← l_k * k, v ← l_v * v in every attention, self and cross, and the inner activation of the feed-forward span
    l_ff * f(W_up x) in front of the down projection. Every l starts at one, so the output is unchanged at the start,
    bit for bit; it merges exactly into rows (k, v) and columns (down). The code scales the output of the second up
    projection in a gated block, which is the same function as scaling what enters the down projection.

    Trained parameters: L (2 d_kv + d_ff) in an encoder or decoder, d_kv the width of the keys and values, and
    L (4 d_kv + d_ff) in a decoder with cross-attention: 540,672 for T0-3B, 1,081,344 for T0-11B.

    Attributes:
        sites: what to rescale; None takes the paper's places that the model has. `:input` behind a name rescales what
            enters the module. T-Few trains at 3e-3; all attention projections may do better than the paper's two.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "ia3"
    citation: ClassVar[str] = """
        @inproceedings{liu2022ia3,
          title={Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning},
          author={Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and Bansal, Mohit
                  and Raffel, Colin},
          booktitle={NeurIPS},
          eprint={2205.05638},
          year={2022}
        }"""

    sites: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        if self.sites is not None:
            sites = anatomy.select(self.sites, self.layers)
        else:
            present = [s for s in SITES if anatomy.has(s)]
            if not present:
                raise SiteError(
                    f"IA3 found neither keys, values nor a feed-forward span in {anatomy.model}: "
                    f"{anatomy.problem or 'this architecture has none'}. Name modules with IA3(sites=[...])."
                )
            sites = anatomy.select(present, self.layers)
        through = [s for s in sites if s.tap == "through"]
        if through:
            raise MethodError(f"IA3 rescales what enters or leaves a module; {through[0].name!r} is neither.")
        return sites

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        return ScaleDelta(site)
