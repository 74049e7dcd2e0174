"""The same held-out rows for every amount of training data, so that points of a low-data curve can be compared."""

from __future__ import annotations

import json
import random
from pathlib import Path

from inlay.compare.plan import Plan
from inlay.data.sources import TEXT_SUFFIXES, Reading, open_source
from inlay.data.spec import default_cache_dir
from inlay.errors import ConfigError
from inlay.folders import replace_text

SMALLEST = 20
"""Rows below which a part cannot be held out that would tell methods apart."""


def fixed_data(plan: Plan) -> str | list[str]:
    """The training data of every run.

    With one size there is nothing to fix, and with `eval_data` or a held-out part of its own the data is so already.
    Otherwise its rows are split once, with the first seed, into two files in the comparison's folder.

    Raises:
        ConfigError: the rows of such data cannot be split here.
    """
    template = plan.template
    if plan.sizes == (None,) or template.eval_data or isinstance(template.data, list):
        return template.data
    folder = plan.output / "data"
    if (folder / "train.jsonl").exists():
        return str(folder)
    reading = Reading(documents=False, seed=plan.seeds[0], cache_dir=Path(default_cache_dir()))
    opened = open_source(template.data, reading)
    if opened.held_out is not None:
        return template.data
    if template.data.endswith(TEXT_SUFFIXES) or len(opened.train) < SMALLEST or template.eval_fraction == 0:
        raise ConfigError(
            f"sizes: {template.data} has no held-out part that stays the same for every size; give one by --eval-data"
        )
    count = max(1, round(len(opened.train) * template.eval_fraction))
    taken = set(random.Random(plan.seeds[0]).sample(range(len(opened.train)), count))
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("test.jsonl", True), ("train.jsonl", False)):
        rows = (opened.train.row(i) for i in range(len(opened.train)) if (i in taken) == chosen)
        replace_text(folder / name, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return str(folder)
