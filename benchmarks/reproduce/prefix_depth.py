"""Virtual tokens in every layer beat virtual tokens at the input alone (arXiv:2101.00190, 7.2; arXiv:2110.07602).

The papers compare equal lengths, at which a prefix has 2 L times the parameters: 120 tokens at the input are as many
parameters as 10 in each of MiniLM's six layers, and tell depth from size.
"""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Prefix tuning: every layer or the embeddings only",
    "embedding-only tuning is much worse than a prefix in every layer (BLEU 62.2 against 70.3 on E2E)",
    "arXiv:2101.00190, section 7.2; arXiv:2110.07602",
    "prefix and P-tuning v2 are both above prompt tuning of the same length by more than the noise",
)


def judge(outcome: Outcome) -> Verdict:
    return both(*(outcome.above(deep, "embeddings only") for deep in ("prefix, every layer", "P-tuning v2")))


if __name__ == "__main__":
    variants = [
        Variant("embeddings only", {"name": "prompt", "length": 10}),
        Variant("embeddings only, 120 tokens", {"name": "prompt", "length": 120}),
        Variant("prefix, every layer", {"name": "prefix", "length": 10}),
        Variant("prefix, upper half", {"name": "prefix", "length": 10, "layers": [-3, -2, -1]}),
        Variant("P-tuning v2", {"name": "ptuningv2", "length": 10}),
    ]
    args = arguments("prefix_depth", __doc__ or "", data="banking77", seeds=3, steps=200, batch=32)
    reproduce(CLAIM, variants, judge, args)
