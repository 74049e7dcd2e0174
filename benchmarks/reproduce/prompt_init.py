"""Prompt tuning: starting from class names beats vocabulary samples beats random (arXiv:2104.08691, figure 3b)."""

from __future__ import annotations

from common import Claim, Outcome, Verdict, arguments, both, reproduce

from inlay.compare import Variant
from inlay.compare.plan import template_of
from inlay.data import prepare
from inlay.methods.prompt import Prompt
from inlay.train import models
from inlay.train.session import data_spec

CLAIM = Claim(
    "Prompt tuning: initialisation",
    "class labels are the best start, sampled vocabulary next, uniform noise last; the gap vanishes in large models",
    "arXiv:2104.08691, section 3.2, figure 3b",
    "class labels are above uniform by more than the noise, and vocabulary is not below uniform",
)


def judge(outcome: Outcome) -> Verdict:
    second = outcome.above("vocabulary", "uniform")
    return both(outcome.above("class labels", "uniform"), Verdict(second.agrees is not False, second.why))


if __name__ == "__main__":
    args = arguments("prompt_init", __doc__ or "", seeds=3)
    config = template_of([], {"model": args.model, "data": args.data, "eval_data": args.eval_data})
    tokenizer = models.load_tokenizer(config)
    labels = (
        prepare(
            data_spec(config, tokenizer, (found := models.load_config(config))), tokenizer, models.kind_of(found)
        ).labels
        or []
    )
    classes = Prompt.from_classes(tokenizer, [label.replace("_", " ") for label in labels], max(20, len(labels)))
    length = classes.length
    variants = [
        Variant("class labels", {"name": "prompt", "length": length, "init": "classes", "class_ids": [list(i) for i in classes.class_ids]}),
        Variant("vocabulary", {"name": "prompt", "length": length, "init": "vocab"}),
        Variant("uniform", {"name": "prompt", "length": length, "init": "uniform"}),
    ]  # fmt: skip
    reproduce(CLAIM, variants, judge, args)
