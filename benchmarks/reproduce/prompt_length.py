"""Prompt tuning: about 20 virtual tokens are enough, one is too few (Lester et al. 2021, arXiv:2104.08691, figure 3a)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Prompt tuning: length",
    "20 tokens are much better than 1, and 100 are hardly better than 20",
    "arXiv:2104.08691, figure 3a",
    "20 is above 1 by more than the noise, and 100 is not above 20 by more than it; all lengths have one learning rate",
)


def judge(outcome: Outcome) -> Verdict:
    more = outcome.above("100 tokens", "20 tokens")
    return both(outcome.above("20 tokens", "1 token"), Verdict(more.agrees is not True, more.why))


if __name__ == "__main__":
    variants = [Variant(f"{n} token{'s' * (n > 1)}", {"name": "prompt", "length": n}) for n in (1, 5, 20, 100)]
    args = arguments("prompt_length", __doc__ or "", data="banking77", seeds=3, steps=200, batch=32)
    reproduce(CLAIM, variants, judge, args)
