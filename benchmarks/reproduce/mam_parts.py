"""MAM, prefix and scaled parallel adapter together, beats each of its parts (arXiv:2110.04366, table 6)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "MAM: the whole and its parts",
    "prefix tuning with a scaled parallel adapter on the FFN is better than either alone at the same budget",
    "arXiv:2110.04366, table 6",
    "MAM is above both parts by more than the noise",
)
PREFIX, ADAPTER = {"name": "inlay", "form": "kv"}, {"name": "inlay", "sites": "ffn", "composition": 4.0}


def judge(outcome: Outcome) -> Verdict:
    return both(outcome.above("MAM", "prefix alone"), outcome.above("MAM", "scaled parallel adapter alone"))


if __name__ == "__main__":
    rate = {"learning_rate": 1e-3}
    variants = [
        Variant("MAM", [PREFIX | {"size": 16}, ADAPTER | {"size": 32}], rate),
        Variant("prefix alone", PREFIX | {"size": 48}, {"learning_rate": 5e-3}),
        Variant("scaled parallel adapter alone", ADAPTER | {"size": 48}, rate),
    ]
    reproduce(CLAIM, variants, judge, arguments("mam_parts", __doc__ or "", seeds=3))
