"""Prompt tuning: starting from class names beats vocabulary samples beats random (arXiv:2104.08691, figure 3b).

The paper's uniform distribution, [-0.5, 0.5], is chosen for T5, whose embeddings are large. A fourth start that is as
wide as the model's own embeddings tells the information in a start from its size.
"""

from __future__ import annotations

import math
from typing import Any

from common import Claim, Outcome, Verdict, arguments, both, reproduce, template

from inlay.compare import Variant
from inlay.config import RunConfig
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


def words_of_classes(config: RunConfig, tokenizer: Any) -> list[str]:
    """The names of the classes, as they are written in running text."""
    found = models.load_config(config)
    labels = prepare(data_spec(config, tokenizer, found), tokenizer, models.kind_of(found)).labels or []
    return [label.replace("_", " ") for label in labels]


def width_of_embeddings(config: RunConfig) -> float:
    """Half the width of the uniform distribution that has the spread of the model's own token embeddings."""
    model = models.load_any(config, "sequence-classification")
    return float(model.get_input_embeddings().weight.detach().std()) * math.sqrt(3)


if __name__ == "__main__":
    args = arguments("prompt_init", __doc__ or "", seeds=3, steps=200, batch=32)
    config = template(args)
    tokenizer = models.load_tokenizer(config)
    words = words_of_classes(config, tokenizer)
    classes = Prompt.from_classes(tokenizer, words, max(20, len(words)))
    prompt = {"name": "prompt", "length": classes.length}
    named = {"init": "classes", "class_ids": [list(ids) for ids in classes.class_ids]}
    own = {"init": "uniform", "scale": round(width_of_embeddings(config), 4)}
    variants = [
        Variant("class labels", prompt | named),
        Variant("vocabulary", prompt | {"init": "vocab"}),
        Variant("uniform", prompt | {"init": "uniform"}),
        Variant("uniform, as wide as the embeddings", prompt | own),
    ]
    reproduce(CLAIM, variants, judge, args)
