"""UniPELT: LoRA, prefix tuning and an adapter together, each behind a gate that learns when it helps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from inlay.methods.base import Method
from inlay.methods.cell import Inlay
from inlay.methods.gated import GateForm


class UniPELT(Method):
    r"""UniPELT (Mao et al. 2022, arXiv:2110.07577): G_L LoRA(W_q, W_v) + G_P prefix + G_A adapter.

    The adapter is Pfeiffer's (reduction 16, after the feed-forward span), the prefix has l = 10 positions, LoRA rank 8
    on queries and values. Each G is a gate, see `inlay.methods.gated.Gate`. Where paper and code differ we follow the
    code: LoRA adapts q and v (a figure says q and k), each with a gate of its own (the paper has one), and the gate
    takes the place of alpha / rank. Nothing can be merged, since gates depend on the input.

    The published gate averages over all positions, padding included. That leaks later tokens to earlier ones in a
    causal model and makes cached decoding differ from one pass, so the default there is a gate for each token, and a
    mean over real tokens in encoders; `gate="published"` gives the original.

    Parameters on BERT-base with a direct prefix: LoRA 294,912 + prefix 184,320 + adapter 894,528 + gates 36,912, in
    sum 1,410,672.

    Attributes:
        variant: "apl" all three, "ap" adapter and prefix, the published ablations "al", "pl" besides.
        rank: of LoRA. length, mid: of the prefix and its MLP (None: direct). reduction: of the adapter.
        gate: the form of the gates.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "unipelt"
    citation: ClassVar[str] = """
        @inproceedings{mao2022unipelt,
          title={UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning},
          author={Mao, Yuning and Mathias, Lambert and Hou, Rui and Almahairi, Amjad and Ma, Hao and Han, Jiawei and
                  Yih, Wen-tau and Khabsa, Madian},
          booktitle={ACL},
          eprint={2110.07577},
          year={2022}
        }"""

    variant: Literal["apl", "ap", "al", "pl"] = "apl"
    rank: int = Field(default=8, ge=1)
    length: int = Field(default=10, ge=1)
    mid: int | None = Field(default=512, ge=1)
    reduction: float = Field(default=16, gt=0)
    gate: GateForm = "auto"
    layers: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[Method, ...]:
        gated = {"composition": "gated", "gate": self.gate, "layers": self.layers}
        lora = {"form": "low_rank", "size": self.rank, "sites": ("attn.q", "attn.v")}
        prefix = {"form": "kv", "size": self.length, "mid": self.mid, "sites": ("heads",)}
        adapter = {
            "form": "bottleneck", "reduction": self.reduction, "sites": "ffn.norm", "insertion": "sequential",
            "init": "bert",
        }  # fmt: skip
        wanted = {"l": lora, "p": prefix, "a": adapter}
        return tuple(Inlay(**(cell | gated)) for key, cell in wanted.items() if key in self.variant)
