"""With 100 examples UniPELT beats its parts and full fine-tuning (Mao et al. 2022, arXiv:2110.07577, table 1)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "UniPELT: the whole and its parts at 100 examples",
    "with 100 examples the gated mix is better than LoRA, prefix and adapter alone and than full fine-tuning",
    "arXiv:2110.07577, table 1: 62.59 against 60.02 for full fine-tuning",
    "UniPELT is above the best of its parts and above full fine-tuning by more than the noise",
)
PARTS = ("LoRA on q, v", "prefix", "Pfeiffer adapter")


def judge(outcome: Outcome) -> Verdict:
    parts = outcome.above("UniPELT", max(PARTS, key=outcome.mean))
    return both(parts, outcome.above("UniPELT", "full"))


if __name__ == "__main__":
    variants = [
        Variant("full", "full"),
        Variant("UniPELT", "unipelt"),
        Variant("LoRA on q, v", {"name": "lora", "sites": ["attn.q", "attn.v"]}),
        Variant("prefix", {"name": "prefix", "length": 10}),
        Variant(
            "Pfeiffer adapter",
            {"name": "bottleneck", "reduction": 16, "sites": ["ffn.norm"], "activation": "relu", "init": "bert"},
        ),
        Variant("BitFit", "bitfit"),
    ]
    args = arguments("unipelt_low_data", __doc__ or "", data="mr", seeds=5, steps=150)
    reproduce(CLAIM, variants, judge, args, sizes=(100,))
