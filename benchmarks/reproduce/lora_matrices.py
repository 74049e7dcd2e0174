"""At one budget, LoRA on several matrices beats one matrix at a higher rank (arXiv:2106.09685, table 5)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "LoRA: which matrices at one budget",
    "q and v at rank 4, or q, k, v and o at rank 2, are better than q or k alone at rank 8; k alone is worst",
    "arXiv:2106.09685, table 5",
    "the better of 'q v' and 'q k v o' is above both q alone and k alone by more than the noise",
)
CELLS = {
    "q r 8": ("q",),
    "k r 8": ("k",),
    "v r 8": ("v",),
    "o r 8": ("o",),
    "q v r 4": ("q", "v"),
    "q k v o r 2": tuple("qkvo"),
}


def judge(outcome: Outcome) -> Verdict:
    best = max(("q v r 4", "q k v o r 2"), key=outcome.mean)
    return both(outcome.above(best, "q r 8"), outcome.above(best, "k r 8"))


if __name__ == "__main__":
    variants = [
        Variant(
            label,
            {"name": "lora", "rank": 8 // len(m), "alpha": 16 // len(m), "sites": [f"attn.{x}" for x in m]},
        )
        for label, m in CELLS.items()
    ]
    reproduce(CLAIM, variants, judge, arguments("lora_matrices", __doc__ or ""))
