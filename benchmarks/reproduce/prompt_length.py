"""Prompt tuning: about 20 virtual tokens are enough, one is too few (Lester et al. 2021, arXiv:2104.08691, figure 3a)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Prompt tuning: length",
    "20 tokens are much better than 1, and 100 are hardly better than 20",
    "arXiv:2104.08691, figure 3a",
    "20 is above 1 by more than the noise, and 20 and 100 are equal up to it",
)


def judge(outcome: Outcome) -> Verdict:
    return both(outcome.above("20 tokens", "1 token"), outcome.equal("20 tokens", "100 tokens"))


if __name__ == "__main__":
    variants = [Variant(f"{n} token{'s' * (n > 1)}", {"name": "prompt", "length": n}) for n in (1, 5, 20, 100)]
    reproduce(CLAIM, variants, judge, arguments("prompt_length", __doc__ or ""))
