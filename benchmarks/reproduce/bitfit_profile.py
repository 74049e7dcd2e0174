"""Which biases move under BitFit, and whether queries and the first FFN layer suffice (arXiv:2106.10199, 4, figure 1)."""

from __future__ import annotations

from pathlib import Path

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant
from inlay.methods.bitfit import change_report
from inlay.train.trained import open_trained

CLAIM = Claim(
    "BitFit: which biases move, and which suffice",
    "key biases barely move, those of queries and of the first FFN layer move most, and training these two suffices",
    "arXiv:2106.10199, section 4 and figure 1",
    "keys move less than queries, q or FFN-up is the first of the projections, and the subset equals all biases",
)
PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")


def moved(outcome: Outcome) -> dict[str, float]:
    run = Path(outcome.comparison.plan.output) / "runs" / "all-biases_all_1"
    return change_report(open_trained(run).adapter).terms


def judge(outcome: Outcome) -> Verdict:
    terms = {name: value for name, value in moved(outcome).items() if name in PROJECTIONS}
    first = max(terms, key=lambda name: terms[name])
    profile = Verdict(
        terms["attn.k"] < terms["attn.q"] and first in ("attn.q", "ffn.up"),
        f"{first} moves most of the projections; keys {terms['attn.k']:.1e}, queries {terms['attn.q']:.1e}",
    )
    return both(profile, outcome.equal("all biases", "query and FFN-up"))


def profile(outcome: Outcome) -> str:
    rows = [f"| {name} | {value:.2e} |" for name, value in moved(outcome).items()]
    return "\n".join(["Mean |change| of the biases, seed 1:", "", "| bias | moved |", "|---|--:|", *rows])


if __name__ == "__main__":
    variants = [
        Variant("all biases", "bitfit"),
        Variant("query and FFN-up", {"name": "bitfit", "sites": ["attn.q", "ffn.up"]}),
        Variant("key", {"name": "bitfit", "sites": ["attn.k"]}),
    ]
    reproduce(CLAIM, variants, judge, arguments("bitfit_profile", __doc__ or ""), keep_runs=True, extra=profile)
