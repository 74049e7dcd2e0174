"""MAM, prefix and scaled parallel adapter together, beats each of its parts (arXiv:2110.04366, table 6).

The prefix goes through an MLP as in the authors' code; what is stored has one size in all three (48 rows a layer).
"""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "MAM: the whole and its parts",
    "prefix tuning with a scaled parallel adapter on the FFN is better than either alone at the same budget",
    "arXiv:2110.04366, table 6",
    "with the better of two rates each, MAM is above both parts by more than the noise",
)
PREFIX = {"name": "inlay", "form": "kv", "mid": 512}
ADAPTER = {"name": "inlay", "sites": "ffn", "composition": 4.0}
FORMS = {
    "MAM": [PREFIX | {"size": 16}, ADAPTER | {"size": 32}],
    "prefix alone": PREFIX | {"size": 48},
    "scaled parallel adapter alone": ADAPTER | {"size": 48},
}
RATES = (3e-4, 1e-3)


def judge(outcome: Outcome) -> Verdict:
    whole, *parts = (outcome.best(form) for form in FORMS)
    return both(*(outcome.above(whole, part) for part in parts))


if __name__ == "__main__":
    variants = [
        Variant(f"{label}, {rate:g}", form, {"learning_rate": rate}) for label, form in FORMS.items() for rate in RATES
    ]
    args = arguments("mam_parts", __doc__ or "", data="banking77", seeds=3, steps=300, batch=32)
    reproduce(CLAIM, variants, judge, args)
