"""LoRA on a 4-bit base equals LoRA on the dense one; NF4 is above FP4, DQ costs nothing (arXiv:2305.14314, tables 3, 4).

Int4 is no storage of inlay; `benchmarks/quant_quality.py` compares its perplexity with the others'.
"""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "QLoRA: adapters on 4-bit bases",
    "adapters on an NF4 base, with or without double quantisation, match those on a 16-bit base; FP4 is slightly worse",
    "arXiv:2305.14314, tables 3 and 4",
    "dense, NF4 and NF4 + DQ are equal, and FP4 is not above NF4 by more than the noise",
)


def judge(outcome: Outcome) -> Verdict:
    worse = outcome.above("NF4", "FP4")
    return both(outcome.equal("dense", "NF4", "NF4 + DQ"), Verdict(worse.agrees is not False, worse.why))


if __name__ == "__main__":
    variants = [
        Variant("dense", "lora"),
        Variant("NF4", "lora", {"quantization": "nf4", "double_quant": False}),
        Variant("NF4 + DQ", "lora", {"quantization": "nf4", "double_quant": True}),
        Variant("FP4", "lora", {"quantization": "fp4", "double_quant": False}),
    ]
    reproduce(CLAIM, variants, judge, arguments("quantised_bases", __doc__ or ""))
