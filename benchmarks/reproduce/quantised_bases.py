"""LoRA on NF4 equals LoRA on the dense base, FP4 and Int4 are below, DQ costs nothing (arXiv:2305.14314, tables 2 to 4)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "QLoRA: adapters on 4-bit bases",
    "adapters on an NF4 base, with or without double quantisation, match those on a 16-bit base; FP4 and Int4 are worse",
    "arXiv:2305.14314, tables 2 to 4",
    "dense, NF4 and NF4 + DQ are equal, and neither FP4 nor Int4 is above NF4 by more than the noise",
)


def judge(outcome: Outcome) -> Verdict:
    worse = (outcome.above("NF4", other) for other in ("FP4", "Int4"))
    coarser = (Verdict(verdict.agrees is not False, verdict.why) for verdict in worse)
    return both(outcome.equal("dense", "NF4", "NF4 + DQ"), *coarser)


if __name__ == "__main__":
    variants = [
        Variant("dense", "lora"),
        Variant("NF4", "lora", {"quantization": "nf4", "double_quant": False}),
        Variant("NF4 + DQ", "lora", {"quantization": "nf4", "double_quant": True}),
        Variant("FP4", "lora", {"quantization": "fp4", "double_quant": False}),
        Variant("Int4", "lora", {"quantization": "int4", "double_quant": False}),
    ]
    reproduce(CLAIM, variants, judge, arguments("quantised_bases", __doc__ or ""))
