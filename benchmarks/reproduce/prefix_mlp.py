"""A prefix trained directly is less stable and worse than one behind an MLP (Li & Liang 2021, arXiv:2101.00190, 4.3)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Prefix tuning: with and without its MLP",
    "training the prefix directly is unstable and slightly worse than through an MLP",
    "arXiv:2101.00190, section 4.3",
    "the better rate with the MLP is above the better rate without it by more than the noise",
)
RATES = (1e-3, 5e-3)


def judge(outcome: Outcome) -> Verdict:
    best = {kind: max((x for x in outcome.rows if x.startswith(kind)), key=outcome.mean) for kind in ("MLP", "direct")}
    return outcome.above(best["MLP"], best["direct"])


if __name__ == "__main__":
    variants = [
        Variant(f"{kind}, {rate:g}", {"name": "prefix", "length": 10, "mid": mid}, {"learning_rate": rate})
        for kind, mid in (("MLP", 512), ("direct", None))
        for rate in RATES
    ]
    reproduce(CLAIM, variants, judge, arguments("prefix_mlp", __doc__ or ""))
