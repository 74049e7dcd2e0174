"""The design space itself: any cell of He et al.'s table as a method.

Legend: B batch, T tokens, I / O features entering / leaving a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Delta, ExtraKV, Frozen, Method, Piece
from inlay.methods.bottleneck import Activation, Bottleneck, Init
from inlay.methods.gated import Gate, GatedDelta, GatedKV, GateForm
from inlay.methods.lora import LoRA
from inlay.methods.multi_head import MultiHead
from inlay.methods.prefix import Prefix

Form = Literal["low_rank", "bottleneck", "kv", "kv_relu"]


class Inlay(Method):
    r"""One cell of the unified view (He et al. 2022, arXiv:2110.04366, table 1): h ← h ∘ Δh.

    * functional form: "low_rank" x W_down W_up, "bottleneck" f(x W_down) W_up, "kv" softmax(q P_k^T) P_v (prefix),
      "kv_relu" ReLU(q P_k^T) P_v (the multi-head parallel adapter);
    * insertion: "parallel" reads x, the input of the frozen span; "sequential" reads y, its output;
    * modified representation, `sites`: one projection, "attn", "ffn", "attn:input", "heads", ...;
    * composition: "add", a number s (scaled add), "learned" (one learned s), "channel" (one a feature), "gated".

    LoRA is (low_rank, parallel, attn.q and attn.v, s); Houlsby's adapter (bottleneck, sequential, attn and ffn, add);
    the scaled parallel adapter (bottleneck, parallel, ffn, 4); prefix tuning (kv, heads). `+` mixes cells. MAM and
    UniPELT are written this way, and so can be what no paper has named: a gated low-rank path beside the whole
    feed-forward block is `Inlay(form="low_rank", sites="ffn", composition="gated")`.

    A gate multiplies Δh by σ(w z + b), z being what Δ reads; with it no other scale acts, as in UniPELT.

    Attributes:
        form: the function.
        size: rank, bottleneck, or number of keys.
        reduction: instead of size, for bottlenecks: width / reduction.
        sites, insertion, composition: as in the table; sites None means every attention for "kv" forms, else "ffn".
        activation, init, dropout: of a bottleneck; low-rank forms use LoRA's initialisation.
        mid: width of the reparametrising MLP of a "kv" form; None trains keys and values directly.
        gate: the form of a gate: "auto" takes "mean" in encoders, "per_token" where tokens must not see the future.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "inlay"
    citation: ClassVar[str] = """
        @inproceedings{he2022unified,
          title={Towards a Unified View of Parameter-Efficient Transfer Learning},
          author={He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor and Neubig, Graham},
          booktitle={ICLR},
          eprint={2110.04366},
          year={2022}
        }"""

    form: Form = "bottleneck"
    size: int | None = Field(default=None, ge=1)
    reduction: float | None = Field(default=None, gt=0)
    sites: str | tuple[str, ...] | None = None
    insertion: Literal["parallel", "sequential"] = "parallel"
    composition: float | Literal["add", "learned", "channel", "gated"] = "add"
    activation: Activation = "relu"
    init: Init = "lora"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    mid: int | None = Field(default=None, ge=1)
    gate: GateForm = "auto"
    layers: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Inlay:
        if self.form in ("kv", "kv_relu"):
            if self.insertion == "sequential":
                raise ValueError(f"form={self.form!r} reads queries, so its insertion is parallel, not sequential")
            if self.composition not in ("add", "gated") or (self.form == "kv_relu" and self.composition == "gated"):
                raise ValueError(f"form={self.form!r} composes by attention, not by {self.composition!r}")
        if self.form == "low_rank" and self.reduction is not None:
            raise ValueError("a low-rank form takes size (its rank), not reduction")
        if self.mid is not None and self.form != "kv":
            raise ValueError(f"mid reparametrises form='kv', not form={self.form!r}")
        return self

    @property
    def _cell(self) -> Method:
        """The piece's own method, without the gate."""
        sites = "ffn" if self.sites is None else self.sites
        if self.form == "kv":
            size = self.size or 10
            return Prefix(length=size, mid=self.mid, sites=self.sites, layers=self.layers, dropout=self.dropout)
        if self.form == "kv_relu":
            return MultiHead(length=self.size or 10, sites=self.sites, layers=self.layers)
        if self._plain_lora:
            scale = 1.0 if isinstance(self.composition, str) else self.composition
            rank = self.size or 8
            return LoRA(rank=rank, alpha=scale * rank, dropout=self.dropout, sites=sites, layers=self.layers)
        return self._beside("x" if self.insertion == "parallel" else "y")

    def _beside(self, reads: Literal["x", "y"]) -> Bottleneck:
        """The function as a path of its own beside or behind a span."""
        return Bottleneck(
            size=self.size or (None if self.reduction else 8), reduction=self.reduction,
            sites="ffn" if self.sites is None else self.sites, reads=reads,
            scale=1.0 if self.composition in ("add", "gated") else self.composition, dropout=self.dropout,
            activation="identity" if self.form == "low_rank" else self.activation,
            init="lora" if self.form == "low_rank" else self.init, layers=self.layers,
        )  # fmt: skip

    @property
    def _plain_lora(self) -> bool:
        """A low-rank parallel form on single projections is LoRA itself, and so can be merged."""
        names = (self.sites,) if isinstance(self.sites, str) else self.sites or ()
        single = (
            bool(names) and all("." in n and not n.endswith((".residual", ".norm", ".heads")) for n in names)
        ) or names == ("linear",)
        fixed = self.composition in ("add", "gated") or not isinstance(self.composition, str)
        return self.form == "low_rank" and self.insertion == "parallel" and single and fixed

    def select(self, anatomy: Anatomy) -> list[Site]:
        cell = self._cell
        if isinstance(cell, LoRA):
            sites = anatomy.select(cell.sites, cell.layers, kinds=("linear", "embedding"))
            if any(s.kind == "module" for s in sites) and all(s.kind in ("module", "linear") for s in sites):
                return sites
        return cell.select(anatomy)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return self._cell.shared(sites)

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Piece:
        cell = self._cell
        if isinstance(cell, LoRA) and site.kind not in ("linear", "embedding"):
            # Experts in one tensor: the same function beside them, which no weight can take in.
            cell = self._beside("x")
        piece = cell.build(site, frozen, shared)
        if self.composition != "gated":
            return piece
        if isinstance(piece, ExtraKV):
            return GatedKV(piece, Gate(site, site.in_features, self.gate))
        if not isinstance(piece, Delta):
            raise MethodError(f"a gate cannot act on {type(piece).__name__} at {site.leave}.")
        reads = getattr(piece, "reads", "x")
        return GatedDelta(piece, Gate(site, site.in_features if reads == "x" else site.out_features, self.gate), reads)
