"""UniPELT's table of training and inference time relative to full fine-tuning (arXiv:2110.07577, section 4.5)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, reproduce

from inlay.compare import Variant

PUBLISHED = {"BitFit": (65, 102), "LoRA": (53, 105), "adapter": (55, 107), "UniPELT (APL)": (67, 127)}
CLAIM = Claim(
    "UniPELT: training and inference time",
    "a training step takes 53 to 67 % of full fine-tuning's, inference 102 to 127 %; UniPELT is the slowest of them",
    "arXiv:2110.07577, section 4.5",
    "every method trains in less time than full fine-tuning, and UniPELT is the slowest at training and at inference",
)


def judge(outcome: Outcome) -> Verdict:
    train = {label: outcome.rows[label].time or 0.0 for label in PUBLISHED}
    infer = {label: outcome.rows[label].inference["batch 16"]["unmerged"] for label in PUBLISHED}
    slowest = "UniPELT (APL)"
    right = (
        max(train.values()) < 1 and max(train, key=train.__getitem__) == max(infer, key=infer.__getitem__) == slowest
    )
    told = ", ".join(f"{n} {100 * train[n]:.0f}/{100 * infer[n]:.0f} ({a}/{b})" for n, (a, b) in PUBLISHED.items())
    return Verdict(right, f"training / inference in % (published): {told}")


if __name__ == "__main__":
    variants = [
        Variant("full", "full"),
        Variant("BitFit", "bitfit"),
        Variant("LoRA", {"name": "lora", "sites": ["attn.q", "attn.v"]}),
        Variant("adapter", {"name": "bottleneck", "reduction": 16, "sites": ["ffn.norm"], "activation": "relu"}),
        Variant("UniPELT (APL)", "unipelt"),
    ]
    args = arguments("unipelt_times", __doc__ or "", seeds=1, steps=12)
    reproduce(CLAIM, variants, judge, args, inference=True, control=False, columns=("time", "unmerged", "merged"))
