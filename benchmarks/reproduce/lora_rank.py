"""LoRA's rank hardly matters: r = 1 is nearly as good as r = 64 (Hu et al. 2021, arXiv:2106.09685, table 6)."""

from __future__ import annotations

from common import Claim, arguments, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "LoRA: rank",
    "on queries and values a rank as small as 1 or 2 is enough; 64 gains nothing",
    "arXiv:2106.09685, table 6",
    "r 1, 2, 8 and 64 are equal",
)
RANKS = (1, 2, 8, 64)


if __name__ == "__main__":
    variants = [
        Variant(f"r {rank}", {"name": "lora", "rank": rank, "alpha": 2 * rank, "sites": ["attn.q", "attn.v"]})
        for rank in RANKS
    ]
    reproduce(CLAIM, variants, lambda o: o.equal(*o.labels), arguments("lora_rank", __doc__ or ""))
