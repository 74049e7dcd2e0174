"""With 100 examples UniPELT beats its parts and full fine-tuning (Mao et al. 2022, arXiv:2110.07577, table 1)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "UniPELT: the whole and its parts at 100 examples",
    "with 100 examples the gated mix is better than LoRA, prefix and adapter alone and than full fine-tuning",
    "arXiv:2110.07577, table 1: 62.59 against 60.02 for full fine-tuning",
    "UniPELT is above the best of its parts by more than the noise",
)
PARTS = ("LoRA on q, v", "prefix", "Pfeiffer adapter")


def judge(outcome: Outcome) -> Verdict:
    verdict = outcome.above("UniPELT", max(PARTS, key=outcome.mean))
    full = outcome.above("UniPELT", "full")
    return Verdict(
        verdict.agrees, f"{verdict.why}; full {outcome.shown('full')} is {'not ' * (not full.agrees)}below it"
    )


if __name__ == "__main__":
    variants = [
        Variant("full", "full"),
        Variant("UniPELT", "unipelt"),
        Variant("LoRA on q, v", {"name": "lora", "sites": ["attn.q", "attn.v"]}),
        Variant("prefix", {"name": "prefix", "length": 10}),
        Variant(
            "Pfeiffer adapter", {"name": "bottleneck", "reduction": 16, "sites": ["ffn.norm"], "activation": "relu"}
        ),
    ]
    args = arguments("unipelt_low_data", __doc__ or "", seeds=3)
    reproduce(CLAIM, variants, judge, args, sizes=(100,))
