"""Adapters slow inference down, merged LoRA does not (arXiv:2106.09685, table 1: +20.7 % and +30.3 % at batch 1)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, reproduce

from inlay.compare import Variant

CLAIM = Claim(
    "Inference latency: adapters and merged LoRA",
    "sequential adapters add 20 to 30 % at batch 1, merged LoRA adds nothing",
    "arXiv:2106.09685, table 1",
    "both adapters take more than 1.05 of the base's time, merged LoRA less than 1.05",
)


def judge(outcome: Outcome) -> Verdict:
    def ratio(label: str, mode: str) -> float:
        figures = outcome.rows[label].inference
        return figures["one row" if "one row" in figures else "decode"][mode]

    slow = {label: ratio(label, "unmerged") for label in ("Houlsby adapter", "Pfeiffer adapter")}
    merged = ratio("LoRA", "merged")
    told = ", ".join(f"{label} {value:.2f}" for label, value in slow.items())
    return Verdict(min(slow.values()) > 1.05 > merged, f"one row at a time: {told}, merged LoRA {merged:.2f}")


def one_row(outcome: Outcome) -> str:
    rows = ["| one row | unmerged | merged |", "|---|--:|--:|"]
    for label, row in outcome.rows.items():
        figure = row.inference.get("one row") or row.inference["decode"]
        rows.append(
            f"| {label} | {figure['unmerged']:.2f} | {figure.get('merged', float('nan')):.2f} |".replace("nan", "–")
        )
    return "\n".join(rows)


if __name__ == "__main__":
    variants = [
        Variant("LoRA", "lora"),
        Variant("Houlsby adapter", {"name": "bottleneck", "size": 64, "init": "houlsby", "train_norms": True}),
        Variant(
            "Pfeiffer adapter", {"name": "bottleneck", "reduction": 16, "sites": ["ffn.norm"], "activation": "relu"}
        ),
        Variant("prefix", "prefix"),
    ]
    args = arguments("inference_latency", __doc__ or "", seeds=1, steps=2)
    reproduce(
        CLAIM, variants, judge, args, inference=True, control=False, columns=("unmerged", "merged"), extra=one_row
    )
