"""AdaLoRA at the budget of LoRA is better, and gives FFN and top layers more rank (arXiv:2303.10512, table 1, figure 3)."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant
from inlay.methods.adalora import ranks
from inlay.train.trained import open_trained

CLAIM = Claim(
    "AdaLoRA: one budget, and where the rank goes",
    "at the same number of parameters AdaLoRA is better than LoRA, and it gives more rank to the FFN and to upper layers",
    "arXiv:2303.10512, table 1 and figure 3",
    "AdaLoRA is above LoRA at rank 2 by more than the noise, and its mean rank in the FFN is above that in attention",
)


def chosen(outcome: Outcome) -> dict[str, int]:
    return ranks(open_trained(Path(outcome.comparison.plan.output) / "runs" / "adalora-target-2_all_1").adapter)


def mean_rank(found: dict[str, int], attention: bool) -> float:
    return statistics.fmean(r for path, r in found.items() if ("attention" in path or "attn" in path) == attention)


def judge(outcome: Outcome) -> Verdict:
    found = chosen(outcome)
    inner, outer = mean_rank(found, True), mean_rank(found, False)
    places = Verdict(outer > inner, f"mean rank {outer:.2f} in the FFN, {inner:.2f} in attention")
    return both(outcome.above("AdaLoRA target 2", "LoRA r 2"), places)


def by_layer(outcome: Outcome) -> str:
    layers: dict[int, list[int]] = {}
    for path, rank in chosen(outcome).items():
        layers.setdefault(int(re.findall(r"\d+", path)[0]), []).append(rank)
    shown = ", ".join(f"{layer}: {statistics.fmean(found):.2f}" for layer, found in sorted(layers.items()))
    return f"Mean rank by layer, seed 1: {shown}."


if __name__ == "__main__":
    variants = [
        Variant("LoRA r 2", {"name": "lora", "rank": 2, "alpha": 4}),
        Variant("AdaLoRA target 2", {"name": "adalora", "target_rank": 2, "init_rank": 3, "interval": 1}),
    ]
    args = arguments("adalora_budget", __doc__ or "", seeds=3, steps=100)
    reproduce(CLAIM, variants, judge, args, keep_runs=True, extra=by_layer)
