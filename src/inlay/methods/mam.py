"""The mix-and-match adapter: a small prefix in every attention, a large scaled parallel adapter on every FFN."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from inlay.methods.base import Method
from inlay.methods.cell import Inlay


class MAM(Method):
    r"""MAM adapter = prefix tuning (l = 30) + scaled parallel adapter on FFN (r = 512, s = 4).

    He et al. 2022, arXiv:2110.04366, section 4.6. Heads need little capacity, feed-forward layers can use much. On
    BART-large 27,377,664 parameters by the paper's formula (6.7 %), 27,414,528 with biases. The prefix is trained
    through an MLP of width 800 as in the authors' code, and stored without it. For classification they use l = 16,
    r = 16, s = 2.

    Attributes:
        length: l, prefix positions in each attention (self and cross).
        mid: width of the prefix's MLP; None trains keys and values directly.
        size: r, the adapter's bottleneck.
        scale: s.
        dropout: between the adapter's activation and its up projection; 0.1 in the authors' runs.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "mam"
    citation: ClassVar[str] = """
        @inproceedings{he2022unified,
          title={Towards a Unified View of Parameter-Efficient Transfer Learning},
          author={He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor and Neubig, Graham},
          booktitle={ICLR},
          eprint={2110.04366},
          year={2022}
        }"""

    length: int = Field(default=30, ge=1)
    mid: int | None = Field(default=800, ge=1)
    size: int = Field(default=512, ge=1)
    scale: float = 4.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    layers: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[Method, ...]:
        return (
            Inlay(form="kv", size=self.length, mid=self.mid, layers=self.layers),
            Inlay(
                form="bottleneck", size=self.size, sites="ffn", insertion="parallel", composition=self.scale,
                dropout=self.dropout, layers=self.layers,
            ),
        )  # fmt: skip
