"""P-tuning v2: deep prompts for language understanding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from inlay.anatomy.base import Anatomy, Site
from inlay.methods.base import Frozen, Method
from inlay.methods.prefix import PrefixKV, Trunks, attention_sites


class PTuningV2(Method):
    r"""Deep prompts: in every attention K ← [P_k; K] and V ← [P_v; V], with a linear head trained beside them.

    Liu et al. 2022, arXiv:2110.07602. The same function as prefix tuning, set up for classification and tagging: no
    reparametrisation by default, P_k and P_v from N(0, 1), dropout on the prefix, and no verbalizer but a linear head
    on the first token's state or on every token. `attach` trains that head (`head="auto"`); the pooler stays frozen.
    Token labels need no shift: the prefix is no part of the sequence. (The reference code passes it as
    `past_key_values` and so shifts positions by P; here positions stay.)

    Settings of the reference code: BERT-large on RTE learning rate 1e-2, length 20, 60 epochs, batch 32; BoolQ 5e-3,
    40. RoBERTa-large on RTE 5e-3, 128, 100 epochs; BoolQ 7e-3, 8; CoNLL-2003 3e-2, 11; CoNLL-2004 6e-2, 144; SQuAD
    5e-3, 16, dropout 0.2. Simple classification wants fewer than 20, hard tagging about 100. It is sensitive to the
    learning rate.

    Trained parameters: 2 P H D for each attention and the head; with `mid` P I + I M + M for each kind of attention and
    (M + 1) 2 H D for each attention. Stored: 2 P H D for each attention and the head.

    Attributes:
        length: P.
        mid: width of an MLP that makes the prefix during training (512 in the reference code); None, the default, has
            none.
        dropout: probability of zeroing an entry of the prefix, for each row, during training.
        sites: "heads" (self-attention) and "cross.heads", also behind "encoder:" or "decoder:"; None takes all.
        layers: only these blocks, negative numbers from the end.
    """

    tag: ClassVar[str] = "p_tuning_v2"
    citation: ClassVar[str] = """
        @inproceedings{liu2022ptuning,
          title={P-Tuning: Prompt Tuning Can Be Comparable to Fine-tuning Across Scales and Tasks},
          author={Liu, Xiao and Ji, Kaixuan and Fu, Yicheng and Tam, Weng and Du, Zhengxiao and Yang, Zhilin
                  and Tang, Jie},
          booktitle={ACL},
          eprint={2110.07602},
          year={2022}
        }"""

    length: int = Field(default=20, ge=1)
    mid: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    sites: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        return attention_sites(anatomy, self.sites, self.layers)

    def shared(self, sites: Sequence[Site]) -> Trunks | None:
        return None if self.mid is None else Trunks(self.length, self.mid)

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> PrefixKV:
        return PrefixKV(site, self.length, 1.0, self.dropout, shared if isinstance(shared, Trunks) else None)
