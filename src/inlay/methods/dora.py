"""Weight-decomposed low-rank adaptation: magnitude and direction of a projection are learned apart.

Legend: B batch, T tokens, I / O features entering / leaving a site, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.anatomy.base import Columns, Site
from inlay.memo import Memo, versions
from inlay.methods.base import Delta, Frozen, Fused
from inlay.methods.lora import Init, LowRank, embedding_factors, factors
from inlay.route import Rows

# Rows of W are read in fp32 this many values at a time, so that a bf16 or quantised W is never held whole in fp32.
CHUNK = 1 << 24


class DoRADelta(Delta):
    """Δ = (m / n - 1) (y - b) + (m / n) s B A dropout(x), with n = ‖W + s B A‖ over each output feature's row.

    A has shape (R, I), B (O, R), m and n (O,). This is W' x + b - y for W' = m (W + s B A) / n, without forming B A:

        n² = ‖W‖² + 2 s rowsum((W Aᵀ) * B) + s² rowsum((B A Aᵀ) * B)

    n is a constant in the backward pass (the paper's section 4.3). At the start B = 0 and m = n, so Δ is exactly zero.

    An embedding's W maps one-hot rows: I is the vocabulary and x holds ids.

    n is kept until A, B or W changes. What escapes that is writing to `A.data` by hand in place; write to A under
    `torch.no_grad()` instead.
    """

    needs_frozen = True

    def __init__(self, site: Site, frozen: Frozen, rank: int, scale: float, dropout: float, init: Init) -> None:
        super().__init__()
        self.scale, self.dropout, self.columns = scale, dropout, site.columns
        self.frozen = frozen.keep()
        self.embedding = site.kind == "embedding"
        self.raised = () if self.embedding else ("B",)
        self.A, self.B = embedding_factors(site, rank) if self.embedding else factors(site, rank, init)
        self._base, self._norm = Memo[Tensor](), Memo[Tensor]()
        on_meta = self.frozen.device.type == "meta"
        m_O = torch.empty(site.out_features, dtype=torch.float32) if on_meta else root(self._base_O(self._weight()))
        self.m = nn.Parameter(m_O.clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        ratio_O, bias_O = self.m / self.norm(), self._bias()
        plain = y if bias_O is None else y - bias_O.to(y.dtype)
        return (ratio_O - 1).to(y.dtype) * plain + ratio_O.to(y.dtype) * self._low(x, y)

    def _low(self, x: Tensor, y: Tensor) -> Tensor:
        if self.embedding:
            low_R = F.embedding(x, self.A.mT).to(y.dtype)
            return self.scale * self.frozen.output_scale * F.linear(low_R, self.B.to(y.dtype))
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(y.dtype))

    @classmethod
    def fused(
        cls,
        deltas: Sequence[Delta],
        columns: Sequence[Columns | None],
        base: type[nn.Module],
        rows: Sequence[Rows] | None = None,
    ) -> Fused | None:
        from inlay.kernels.dora import DoRALinear

        (first, *others), (ranges, *_) = deltas, columns
        # Each of several is relative to what the frozen module alone gives.
        if isinstance(first, DoRADelta) and not others and ranges is None and rows is None:
            return DoRALinear.make(first, base)
        return None

    def norm(self) -> Tensor:
        """n of shape (O,), fp32, without gradient."""
        return self._norm.get(lambda: (*self.frozen.version, *versions(self.A, self.B)), self._norm_O)

    def _norm_O(self) -> Tensor:
        if self.A.is_meta:
            return self.m.detach()
        # A tensor made in inference mode could not be used by a later backward pass. Autocast would round it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.A.device.type, enabled=False):
            weight_OI = self._weight()
            A_RI, B_OR = self.A.detach().float(), self.B.detach().float()
            cross_O = _cross(weight_OI, A_RI, B_OR)
            gram_O = (B_OR @ (A_RI @ A_RI.mT) * B_OR).sum(-1)
            return root(self._base_O(weight_OI) + 2 * self.scale * cross_O + self.scale**2 * gram_O)

    def _base_O(self, weight_OI: Tensor) -> Tensor:
        """‖W‖² of each row, fp32."""
        return self._base.get(lambda: self.frozen.version, lambda: squares(weight_OI))

    def _weight(self) -> Tensor:
        return rows(self.frozen.weight(), self.columns)

    def _bias(self) -> Tensor | None:
        bias = self.frozen.bias
        return None if bias is None else rows(bias.detach(), self.columns)

    def weight_delta(self) -> Tensor:
        weight_OI = self._weight().float()
        ratio_O = self.m / self.norm()
        return ratio_O[:, None] * (weight_OI + self.scale * (self.B @ self.A)) - weight_OI


class DoRA(LowRank):
    r"""Weight-decomposed low-rank adaptation: W' = m (W + s B A) / ‖W + s B A‖ (Liu et al. 2024, arXiv:2402.09353).

    The norm is taken over the input features, one for each output feature; m starts at ‖W‖, so the output is unchanged
    at the start, bit for bit. The norm is constant in the backward pass. Where the paper's code drops entries of x in
    front of W as well as of A, which costs a second product with W, dropout here is LoRA's: in front of A only.

    Δ is relative to the frozen module's own output. On rows where other adapters act too, all deltas add up.

    Trained parameters: rank (I + O) + O for each projection.

    Attributes:
        rank, alpha, dropout, rslora, init, sites, layers: as those of `LoRA`. About half of LoRA's rank does as well.
    """

    tag: ClassVar[str] = "dora"
    citation: ClassVar[str] = """
        @inproceedings{liu2024dora,
          title={DoRA: Weight-Decomposed Low-Rank Adaptation},
          author={Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank and
                  Cheng, Kwang-Ting and Chen, Min-Hung},
          booktitle={ICML},
          eprint={2402.09353},
          year={2024}
        }"""

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        return DoRADelta(site, frozen, self.rank_of(site), self.scale_of(site), self.dropout, self.init)


def rows(tensor: Tensor, columns: Columns | None) -> Tensor:
    """The rows of a weight, or the entries of a bias, that belong to one part of a fused projection."""
    if columns is None:
        return tensor
    parts = [tensor[lo:hi] for lo, hi in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def chunks(weight_OI: Tensor) -> list[Tensor]:
    """The weight, some rows at a time."""
    return list(torch.split(weight_OI, max(1, CHUNK // weight_OI.shape[1])))


def _cross(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """rowsum((W Aᵀ) * B), fp32. A bf16 weight is read as it is: x Aᵀ is computed with the same rounded A."""
    from inlay.kernels import lowrank

    if weight_OI.stride(-1) == 1 and lowrank.fits(weight_OI, A_RI, B_OR):
        return lowrank.cross(weight_OI, A_RI, B_OR)
    return (_product(weight_OI, A_RI) * B_OR).sum(-1)


def _product(weight_OI: Tensor, A_RI: Tensor) -> Tensor:
    if weight_OI.dtype in (torch.float32, torch.bfloat16):
        return (weight_OI @ A_RI.mT.to(weight_OI.dtype)).float()
    return torch.cat([w.float() @ A_RI.mT for w in chunks(weight_OI)])


def squares(weight_OI: Tensor) -> Tensor:
    """‖W‖² of each row, fp32."""
    return torch.cat([w.float().square().sum(-1) for w in chunks(weight_OI)])


def root(squared_O: Tensor) -> Tensor:
    """The norm; a row of zeros keeps a norm that can be divided by."""
    return squared_O.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
