"""Parallel adapters beat sequential ones, and FFN beats attention (He et al. 2022, arXiv:2110.04366, tables 3 and 4)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Adapters: parallel or sequential, FFN or attention",
    "the parallel form is better than the sequential one, and the FFN a better place than attention",
    "arXiv:2110.04366, tables 3 and 4",
    "parallel is above sequential at the FFN, and FFN above attention in parallel form, by more than the noise",
)


def judge(outcome: Outcome) -> Verdict:
    return both(
        outcome.above("parallel, ffn", "sequential, ffn"),
        outcome.above("parallel, ffn", "parallel, attn"),
    )


if __name__ == "__main__":
    variants = [
        Variant(f"{form}, {place}", {"name": "inlay", "size": 24, "sites": place, "insertion": form})
        for form in ("parallel", "sequential")
        for place in ("ffn", "attn")
    ]
    args = arguments("adapter_placement", __doc__ or "", data="banking77", seeds=3, steps=300, batch=32)
    reproduce(CLAIM, variants, judge, args)
