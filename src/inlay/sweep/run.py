"""A sweep from its points to its folder: runs side by side where they can share the base, else one after another.

Each run has the run folder that `inlay train` would leave, named by its settings. The folder of the sweep holds
`sweep.json` (what every run shares), `README.md` (the table) and `sweep.png`. Called again, finished runs are kept,
interrupted ones go on, and new points are added.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from inlay import folders
from inlay.config import RunConfig
from inlay.config_loading import build_method, load, method_name
from inlay.errors import ConfigError
from inlay.folders import read_json, replace_text
from inlay.sweep import table, together
from inlay.sweep.space import Point, Space
from inlay.sweep.together import Member
from inlay.train import checkpoint, runfolder
from inlay.train.defaults import resolve_method, resolve_steps, width_of
from inlay.train.loop import total_steps
from inlay.train.narrate import Narrator, escape
from inlay.train.precision import TRAINS_THE_BASE
from inlay.train.run import Run, train
from inlay.train.session import Session, attach_method, open_session
from inlay.train.signals import StopRequest

OWN = (
    "method", "learning_rate", "head_learning_rate", "weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_ratio", "warmup_steps", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "loraplus_lr_ratio", "output_dir", "resume", "early_stopping_patience", "early_stopping_threshold",
)  # fmt: skip
"""Settings in which runs may differ and still share every forward pass."""


@dataclasses.dataclass(frozen=True)
class Swept:
    """What a sweep came to: a row per run, the best first."""

    folder: Path
    metric: str
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to be made."""

    point: Point
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(str(self.config.output_dir))

    @property
    def method(self) -> str:
        """The lower-case name of its method."""
        return method_name(self.config.method)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do; the results are the last file of a run."""
        return (self.folder / "results.json").exists()


def sweep(
    file: str | None,
    space: Space,
    points: Sequence[Point],
    *,
    output_dir: str | None = None,
    most_together: int = 8,
    console: Console | None = None,
    quiet: bool = False,
) -> Swept:
    """Make every run of a sweep that is not there yet, and write the table and the plot.

    Args:
        file: a YAML file with what all runs share, or None.
        space: the varied keys and the words that all runs share.
        points: the runs, of `space.grid()` or `space.sample()`.
        output_dir: the folder of the sweep; `runs/sweep-<model>-<data>` when absent.
        most_together: how many runs may share a forward pass; 1 makes one after another.
        console, quiet: where to print, and whether to.

    Raises:
        ConfigError: a point is no run configuration, or the folder holds another sweep.
        Interrupted: a signal came; the same call goes on.
    """
    narrator = Narrator(console or Console(), quiet=quiet)
    jobs = _jobs(file, space, points, output_dir)
    folder = jobs[0].folder.parent
    _same_sweep(folder, jobs[0].config, space)
    waiting = [job for job in jobs if not job.finished]
    narrator.fact("sweep", f"{len(jobs)} runs over {', '.join(key for key, _ in space.axes)} in {escape(str(folder))}")
    if len(waiting) < len(jobs):
        narrator.fact("", f"{len(jobs) - len(waiting)} are finished already")
    for group in alike(waiting):
        while group:
            done = make_some(group, most_together, narrator)
            group = [job for job in group if job not in done]
    rows, metric, greater = table.rows_of([(dict(job.point.values), job.folder) for job in jobs], jobs[0].config)
    table.write(folder, rows, metric, [key for key, _ in space.axes], greater=greater)
    table.show(narrator, rows, metric)
    narrator.fact("written", f"{escape(str(folder / 'README.md'))}, sweep.png and a run folder for each")
    return Swept(folder, metric, rows)


def _jobs(file: str | None, space: Space, points: Sequence[Point], output_dir: str | None) -> list[Job]:
    jobs = []
    folder = Path(output_dir) if output_dir is not None else None
    for point in points:
        config = load(file, [*space.fixed, *point.words], {"baseline": False})
        if folder is None:
            folder = runfolder.default_folder(config, "sweep")
        if config.output_dir is not None or config.resume:
            raise ConfigError(
                "a sweep names the folders of its runs and resumes by itself: leave output_dir and resume"
            )
        jobs.append(Job(point, config.model_copy(update={"output_dir": str(folder / point.name)})))
    return jobs


def _same_sweep(folder: Path, config: RunConfig, space: Space) -> None:
    """Write down what all runs share, or compare it with what is written."""
    varied = {key.partition(".")[0] for key, _ in space.axes}
    shared = {k: v for k, v in config.model_dump(mode="json").items() if k not in varied | {"output_dir", "resume"}}
    path = folder / "sweep.json"
    if path.exists():
        then = read_json(path)
        changes = [f"  {k}: {a!r} then, {b!r} now" for k, a, b in checkpoint.differences(then, shared)]
        if changes:
            raise ConfigError(
                f"{folder} holds a sweep that differs from this one; name another folder:\n" + "\n".join(changes)
            )
        return
    if folders.holds_something(folder):
        raise ConfigError(f"output_dir: {folder} is not empty and holds no sweep; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(shared, indent=1))


def alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Runs that are equal but for what each may have of its own."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        key = json.dumps(job.config.model_dump(mode="json", exclude=set(OWN)), sort_keys=True)
        groups.setdefault(key, []).append(job)
    return list(groups.values())


def make_some(group: Sequence[Job], most: int, narrator: Narrator) -> list[Job]:
    """Make the first run of a group, with as many others as can go along; returns those made."""
    lead = group[0]
    fitting = [job for job in group if can_share(job)]
    if most < 2 or lead not in fitting or len(fitting) < 2:
        narrator.fact("run", escape(lead.point.name))
        train(_or_resumed(lead), console=narrator.console, quiet=True)
        return [lead]
    with StopRequest() as stop:
        session = open_session(lead.config, lead.method, narrator.say)
        drawn = torch.get_rng_state()
        mates = [(job, resolved) for job in fitting if (resolved := _resolved(job, session)) is not None][:most]
        narrator.fact("run", *(escape(job.point.name) for job, _ in mates))
        _side_by_side(session, mates, drawn, stop, narrator)
    return [job for job, _ in mates]


def can_share(job: Job) -> bool:
    """Whether a run may be one of several in a forward pass, as far as its configuration says."""
    config = job.config
    alone = (
        config.packing or config.gradient_checkpointing or config.torch_compile or config.fp16 or config.fsdp
        or getattr(config, "template", None) is not None or int(_world()) > 1
    )  # fmt: skip
    if alone or any(part in TRAINS_THE_BASE for part in job.method.split("+")):
        return False
    return not _draws(build_method(config.method).spec())


def _draws(spec: Any) -> bool:
    """Whether a method draws random numbers in training: another run's rows must not shift them."""
    if isinstance(spec, dict):
        return any(bool(v) if "dropout" in str(k) else _draws(v) for k, v in spec.items()) or (
            spec.get("method") in ("diff_pruning", "diffpruning")
        )
    return isinstance(spec, (list, tuple)) and any(_draws(part) for part in spec)


def _world() -> str:
    import os

    return os.environ.get("WORLD_SIZE", "1")


def _resolved(job: Job, session: Session) -> RunConfig | None:
    """The run's own resolved configuration, or None where it would need other batches, steps or precision."""
    update = {"bf16": session.config.bf16, "dtype": session.config.dtype}
    width = width_of(session.model.config)
    config = resolve_method(job.config.model_copy(update=update), job.method, session.task, width)
    steps = total_steps(config, len(session.train_batches))
    config = resolve_steps(config, steps, held_out=bool(session.prepared.evals))
    ours, theirs = (c.model_dump(exclude=set(OWN)) for c in (config, session.config))
    return config if ours == theirs else None


def _or_resumed(job: Job) -> RunConfig:
    started = (job.folder / runfolder.MARK).exists()
    return job.config.model_copy(update={"resume": str(job.folder)}) if started else job.config


def _side_by_side(
    session: Session, mates: Sequence[tuple[Job, RunConfig]], drawn: torch.Tensor, stop: StopRequest, narrator: Narrator
) -> None:
    import inlay

    starts = _common_start([job.folder for job, _ in mates])
    runs: list[tuple[Run, Member]] = []
    for number, (job, config) in enumerate(mates):
        torch.set_rng_state(drawn)  # as if the base had just been loaded for this run alone
        name = f"run-{number}"
        mine = dataclasses.replace(session, config=config)
        adapter = attach_method(mine, name, resumed=starts[number] is not None)
        run = Run(mine, adapter, job.folder, Narrator(narrator.console, quiet=True), stop, job.method)
        loop = run.loop()
        run.begin(loop, starts[number], resume=False)
        if number == 0:
            loop.display.quiet, loop.display.live = narrator.quiet, narrator.console.is_terminal and not narrator.quiet
        runs.append((run, Member(name, loop)))
    stop.defer()
    try:
        with runs[0][1].loop.display:
            together.fit(session.model, [member for _, member in runs])
    finally:
        for _, member in runs:
            for tracker in member.loop.trackers:
                tracker.close()
    stop.release()
    for run, member in runs:
        inlay.use(session.model, member.name)
        run.finish(member.loop, member.loop.state)


def _common_start(runs: Sequence[Path]) -> list[Path | None]:
    """For each run its checkpoint of the latest step of which all have one; none where there is no such step."""
    newest = [checkpoint.newest(folder)[0] for folder in runs]
    steps = [int(path.name.rpartition("-")[2]) if path is not None else 0 for path in newest]
    found = [checkpoint.whole(folder, min(steps)) for folder in runs]
    return found if all(found) else [None] * len(runs)
