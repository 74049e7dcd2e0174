"""A prefix trained directly is less stable and worse than one behind an MLP (Li & Liang 2021, arXiv:2101.00190, 4.3).

Both forms get the same rates to choose from; the head has its own.
"""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Prefix tuning: with and without its MLP",
    "training the prefix directly is unstable and slightly worse than through an MLP",
    "arXiv:2101.00190, section 4.3",
    "with the best of three rates each, the MLP is above the direct form by more than the noise",
)
RATES = (1e-3, 5e-3, 2e-2)


def judge(outcome: Outcome) -> Verdict:
    verdict = outcome.above(outcome.best("MLP"), outcome.best("direct"))
    return Verdict(verdict.agrees, f"{verdict.why}; {reach(outcome, 'MLP')}, {reach(outcome, 'direct')}")


def reach(outcome: Outcome, kind: str) -> str:
    """How far the rates lie apart: what is meant by stability."""
    values = [outcome.mean(label) for label in outcome.labels if label.startswith(kind)]
    return f"over the rates {kind} differs by {max(values) - min(values):.3f}"


if __name__ == "__main__":
    variants = [
        Variant(f"{kind}, {rate:g}", {"name": "prefix", "length": 10, "mid": mid}, {"learning_rate": rate})
        for kind, mid in (("MLP", 512), ("direct", None))
        for rate in RATES
    ]
    args = arguments("prefix_mlp", __doc__ or "", data="banking77", seeds=3, steps=300, batch=32)
    reproduce(CLAIM, variants, judge, args)
