"""BitFit: only biases are trained.

Legend: B batch, T tokens, O features leaving a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Delta, Frozen, Method

if TYPE_CHECKING:
    from inlay.adapter import Adapter


class BiasDelta(Delta):
    """Δ = b, one value per output feature."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(site.out_features, dtype=torch.float32))

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


@dataclass(frozen=True)
class ChangeReport:
    """How far biases moved, mean |b| per entry: blocks (rows) by kind of bias (columns), the paper's figure 1.

    Attributes:
        rows: blocks, by stack and index; "other" for what stands outside of them.
        columns: kinds of bias, "attn.q", "ffn.up", "ffn.norm", ...
        values: one list for each row; NaN where a block has no such bias.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float]]

    @property
    def terms(self) -> dict[str, float]:
        """The mean over the blocks for each kind of bias, the one that moved most first."""
        means = {}
        for j, column in enumerate(self.columns):
            found = [row[j] for row in self.values if row[j] == row[j]]
            means[column] = sum(found) / len(found)
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        head = " " * width + "".join(f"  {c:>{max(8, len(c))}}" for c in self.columns)
        lines = [
            f"{row:<{width}}"
            + "".join(
                f"  {'' if v != v else f'{v:.2e}':>{max(8, len(c))}}" for c, v in zip(self.columns, values, strict=True)
            )
            for row, values in zip(self.rows, self.values, strict=True)
        ]
        most = ", ".join(f"{term} {value:.2e}" for term, value in list(self.terms.items())[:3])
        return "\n".join(["mean |change| of each bias", head, *lines, f"moved most: {most}"])

    def picture(self, path: str | None = None) -> Any:
        """The table as a heat map.

        Args:
            path: write it there, in the format of the suffix.

        Returns:
            A matplotlib figure.
        """
        from inlay.heatmap import heatmap

        title = "How far each bias moved"
        return heatmap(self.rows, self.columns, self.values, title=title, unit="mean |change|", path=path)


def change_report(adapter: Adapter) -> ChangeReport:
    """Which biases moved, and how far: (1 / d) ‖b‖₁ for every bias term (Ben Zaken et al. 2022, figure 1).

    The paper finds that query biases and those of the first feed-forward projection move most, key biases hardly at
    all. A fused projection is reported by its parts.

    Raises:
        MethodError: the adapter has no BitFit part.
    """
    from inlay.heatmap import by_layer

    found = [
        (part, float(change))
        for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True)
        if isinstance(piece, BiasDelta)
        for part, change in _parts(adapter.model, site, piece.b.detach().abs())
    ]
    if not found:
        raise MethodError(f"{adapter!r} has no BitFit part, so it has no biases to report on.")
    return ChangeReport(*by_layer(adapter.model, [s for s, _ in found], [v for _, v in found]))


def _parts(model: nn.Module, site: Site, moved_O: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """A bias, or those of q, k and v where they are one."""
    from inlay.anatomy import anatomy
    from inlay.anatomy.roles import roles

    ranges = [columns for leaf, columns in roles(anatomy(model)) if leaf == site.leave and columns is not None]
    if site.columns is not None or not ranges:
        yield site, moved_O.mean()
        return
    for columns in ranges:
        yield dataclasses.replace(site, columns=columns), torch.cat([moved_O[lo:hi] for lo, hi in columns]).mean()
