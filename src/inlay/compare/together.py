"""Several runs of a comparison in one pass over the base, and what each costs from a few steps of it alone.

Runs of one seed and one amount of data see the same batches, so those whose methods leave the base as it is can share
every forward pass (`inlay.sweep.together`): each has its rows, optimizer, schedule, head and checkpoints, and comes out
as if it had been trained alone. Time and memory of a shared pass are nobody's own, hence the short runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from inlay.compare.cell import Costs, folder_of, path_of_costs, steps_of
from inlay.compare.costs import PeakMemory
from inlay.compare.plan import NO_CURVE, Cell, Plan
from inlay.config import RunConfig
from inlay.config_loading import build_method
from inlay.errors import MethodError, SiteError, TrainingError
from inlay.folders import remove, replace_text
from inlay.sweep.run import Job, alike, can_share, make_some
from inlay.sweep.space import Point
from inlay.train.narrate import Narrator
from inlay.train.report import read_log
from inlay.train.run import train
from inlay.train.wording import virtual_tokens

STEPS = 12
"""Steps of the short run."""

MOST = 8
"""Runs in one pass."""


def train_together(plan: Plan, cells: Sequence[Cell], data: str | list[str], most: int = MOST) -> None:
    """Train those of the cells that can share their passes; their run folders are finished then.

    Where one of them must not go on (its loss is no number), the others keep their checkpoints, and who runs them next
    runs them alone.

    Args:
        plan: the comparison.
        cells: of one seed and one amount of data.
        data: the training data.
        most: runs in one pass.

    Raises:
        Interrupted: a signal came; every run has its checkpoint.
    """
    for cell in cells:
        _measure_alone(plan, cell, data)
    jobs = []
    for cell in cells:
        folder = folder_of(plan, cell)
        config = plan.config(cell, data).model_copy(update={"output_dir": str(folder), "resume": False})
        job = Job(Point(()), config)
        if not job.finished and path_of_costs(plan, cell).exists() and can_share(job) and not _lengthens(config):
            jobs.append(job)
    narrator = Narrator(Console(quiet=True), quiet=True)
    for group in alike(jobs):
        while len(group) > 1:
            try:
                done = make_some(group, most, narrator)
            except (MethodError, SiteError, TrainingError):
                break
            group = [job for job in group if job not in done]


def _lengthens(config: RunConfig) -> bool:
    """Whether the method puts tokens of its own into the rows, which would lengthen those of all."""
    return virtual_tokens(build_method(config.method), None) > 0


def _measure_alone(plan: Plan, cell: Cell, data: str | list[str]) -> None:
    """A few steps of a variant alone, for its time and its memory; nothing where the method cannot be used."""
    path = path_of_costs(plan, cell)
    if path.exists():
        return
    folder = path.with_suffix("")
    config = plan.config(plan.timed(cell), data)
    update = {"output_dir": str(folder), "max_steps": STEPS, "eval_steps": NO_CURVE, "save_steps": NO_CURVE}
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with PeakMemory() as peak:
            result = train(config.model_copy(update=update | {"logging_steps": 1}), quiet=True)
    except (MethodError, SiteError, TrainingError):
        return  # its own run says why
    costs = Costs(result.trained_parameters, peak.bytes, steps_of(read_log(folder)))
    replace_text(path, json.dumps(asdict(costs), indent=1))
    remove(folder)
