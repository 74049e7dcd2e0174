"""The multi-head parallel adapter: a key-value memory with ReLU in place of softmax, beside every attention head.

Legend: B batch, T queries, H query heads, P length, D head size of queries, D_v of values.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.methods.base import Frozen, HeadDelta, Method
from inlay.methods.prefix import attention_sites, heads_of


class MultiHeadDelta(HeadDelta):
    """Δ_i = ReLU(q_i P_k,i^T) P_v,i for each head i, with P_k of shape (P, H D) and P_v (P, H D_v)."""

    def __init__(self, site: Site, length: int, scaled: bool, init: str) -> None:
        super().__init__()
        heads = heads_of(site)
        self.length, self.heads, self.scaled = length, heads.query, scaled
        self.key_size, self.value_size = heads.key_size, heads.value_size
        self.P_k = nn.Parameter(torch.randn(length, self.heads * self.key_size, dtype=torch.float32) * 0.02)
        self.P_v = nn.Parameter(torch.randn(length, self.heads * self.value_size, dtype=torch.float32) * 0.02)
        if init == "lora":
            nn.init.zeros_(self.P_v)

    def forward(self, q: Tensor) -> Tensor:
        k = self.P_k.to(q.dtype).view(self.length, self.heads, self.key_size).transpose(0, 1)
        v = self.P_v.to(q.dtype).view(self.length, self.heads, self.value_size).transpose(0, 1)
        scores = torch.matmul(q, k.mT)
        if not self.scaled:
            scores = scores * self.key_size**0.5
        return torch.matmul(F.relu(scores), v)


class MultiHead(Method):
    r"""The multi-head parallel adapter: head_i ← head_i + ReLU(x W_q,i P_k,i^T) P_v,i, before the output projection.

    He et al. 2022, arXiv:2110.04366, section 4.3: a parallel adapter on the heads, of as many parameters as a prefix of
    the same length. W_q is the model's own, frozen. Against a prefix there is no softmax and so no gate λ; the model's
    keys keep their weights.

    The paper writes no 1 / sqrt(D). Its code has the factor in RoBERTa and lacks it in BART, where the queries
    also pass a LayerNorm of their own. Here q is the query as the model's own scores use it, with rotary embedding and
    the model's scaling (1 / sqrt(D); T5 has none). `scaled=False` multiplies by sqrt(D), which takes the usual scaling
    out again. Both forms differ by a constant factor on P_k, that is, in initialisation and learning rate.

    Trained parameters: P H (D + D_v) for each attention, H the query heads.

    Attributes:
        length: P.
        scaled: use the model's scaled queries.
        init: "bert", both N(0, 0.02²), as in the reference code; "lora" starts with P_v = 0, so that the output is
            unchanged at first, bit for bit.
        sites: "heads" (self-attention) and "cross.heads", also behind "encoder:" or "decoder:"; None takes all.
        layers: only these blocks, negative numbers from the end.
    """

    tag: ClassVar[str] = "multi_head"
    citation: ClassVar[str] = """
        @inproceedings{he2022unified,
          title={Towards a Unified View of Parameter-Efficient Transfer Learning},
          author={He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor and Neubig, Graham},
          booktitle={ICLR},
          eprint={2110.04366},
          year={2022}
        }"""

    length: int = Field(default=30, ge=1)
    scaled: bool = True
    init: Literal["bert", "lora"] = "bert"
    sites: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        return attention_sites(anatomy, self.sites, self.layers)

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> MultiHeadDelta:
        return MultiHeadDelta(site, self.length, self.scaled, self.init)
