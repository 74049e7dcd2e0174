"""One run from its configuration to its folder: prepare, tell the plan, train, compare, report."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding

from inlay import folders
from inlay.config import RunConfig
from inlay.config_loading import build_method, method_name
from inlay.errors import TrainingError
from inlay.train import checkpoint, insights, models, recompute, report, runfolder, trackers
from inlay.train.baseline import BASELINE_NAME, head_only
from inlay.train.checkpoint import RunState
from inlay.train.defaults import kind_of
from inlay.train.distributed import Team, is_sharded, shard
from inlay.train.evaluate import Evaluator
from inlay.train.generate import Decoding
from inlay.train.loop import Loop
from inlay.train.metrics import MAIN
from inlay.train.narrate import INDENT, Narrator, escape
from inlay.train.progress import Display
from inlay.train.samples import Samples, generation_metrics
from inlay.train.session import Session, attach_method, identity, open_session
from inlay.train.signals import StopRequest
from inlay.train.wording import without_virtual_tokens
from inlay.train.zero import share_out

ADAPTER = "default"


@dataclass
class Result:
    """What a run came to. `results` maps "untouched", "head only" and the method's name to held-out metrics."""

    run: Path
    state: RunState
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    adapter_bytes: int = 0
    trained_parameters: int = 0
    commands: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def train(config: RunConfig, *, console: Console | None = None, quiet: bool = False, pictures: bool = True) -> Result:
    """Train an adapter as a configuration says, and leave a run folder.

    Args:
        config: from `inlay.config_loading.load` or made in Python.
        console: where to print; standard output when absent.
        quiet: print nothing.
        pictures: draw the curves and what was learnt; False saves seconds for who looks at the figures alone.

    Raises:
        ConfigError, DataError: what was asked for cannot be done; nothing was written.
        TrainingError: the run must not go on; the run folder holds what was reached.
        CheckpointError: nothing complete to resume from, or another run's checkpoint.
        Interrupted: a signal came; a checkpoint is on disk.
    """
    trackers.check(config.report_to)
    name = method_name(config.method)
    build_method(config.method)  # a wrong setting is told before anything is loaded
    narrator = Narrator(console or Console(), quiet=quiet)
    run, start = runfolder.place(config, name)
    with StopRequest() as stop:
        session = open_session(config, name, narrator.say, _batches_per_step(config, run, start))
        run = Path(Team(session.accelerator).of_main(str(run)))
        adapter = attach_method(session, ADAPTER, resumed=bool(config.resume))
        _ready_model(session, adapter)
        with _disk_told(run):
            return Run(session, adapter, run, narrator, stop, name, pictures).go(start, resume=bool(config.resume))


@contextlib.contextmanager
def _disk_told(run: Path) -> Iterator[None]:
    """A disk that is full or takes nothing is no fault of the program: say where, and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EFBIG, EACCES, EPERM, EROFS, EIO):
            raise
        raise TrainingError(
            f"{run}: {error}. What was written before is whole. Make room, or give back the permission, and go on "
            f"with: inlay train --resume {run}"
        ) from error


def _batches_per_step(config: RunConfig, run: Path, start: Path | None) -> int | None:
    """How many batches a step of the run has that is to be resumed."""
    if not config.resume or config.allow_changed:
        return None
    start = start or runfolder.newest(run)[0]
    found = checkpoint.read_state(start)["identity"].get("batches per step") if start is not None else None
    return found if isinstance(found, int) and found > 0 else None


def _ready_model(session: Session, adapter: Any) -> None:
    """What must come after attaching: how packed rows are kept apart, checkpointing, sharding, compiling."""
    config, model = session.config, session.model
    if config.packing:
        from inlay.data import find_layout

        session.train_batches.layout = find_layout(model)
        session.train_batches.mask_dtype = torch.bfloat16 if config.bf16 else model.dtype
    if config.gradient_checkpointing:
        recompute.turn_on(model)
    if config.fsdp:
        shard(model, adapter, Team(session.accelerator))
    if session.zero is not None:
        share_out(model, adapter, Team(session.accelerator), session.zero)
    if config.torch_compile:
        model.compile()


class Run:
    """One run on a session: `go` is all of it; `loop`, `begin` and `finish` are its parts, for who trains several."""

    def __init__(
        self,
        session: Session,
        adapter: Any,
        run: Path,
        narrator: Narrator,
        stop: StopRequest,
        method: str,
        pictures: bool = True,
    ) -> None:
        self.session, self.adapter, self.run, self.narrator, self.stop = session, adapter, run, narrator, stop
        self.config, self.method, self.pictures = session.config, method, pictures
        self.main = session.accelerator.is_main_process
        narrator.quiet = narrator.quiet or not self.main
        self.samples = self._samples()
        self.evaluator = Evaluator(
            session.model,
            session.prepared.evals,
            session.eval_batches,
            session.task,
            session.tokenizer,
            session.autocast,
            stop=stop,
            accelerator=session.accelerator,
            after=self.samples.write if self.samples is not None else None,
        )

    def go(self, start: Path | None, *, resume: bool) -> Result:
        """All of it, from the plan to the model card."""
        self.narrator.found(self.session)
        if self.session.zero is not None and self.session.zero.stage < 3:
            self.narrator.fact(
                "deepspeed",
                f"ZeRO stage {self.session.zero.stage}: the base is whole on each process, and so are the adapter's "
                "moments and gradients, which are small; stage 3 shares the base out",
            )
        loop = self.loop()
        self.narrator.plan(self.session, self.adapter, loop.total_steps, self.run)
        self._show_example()
        self.begin(loop, start, resume=resume)
        self.stop.defer()
        with loop.display:
            try:
                state = loop.fit()
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"step {loop.state.step + 1}: out of memory. Lower per_device_train_batch_size (and raise "
                    "gradient_accumulation_steps as much), lower max_length, or set gradient_checkpointing: true"
                ) from error
            finally:
                for tracker in loop.trackers:
                    tracker.close()
        self.stop.release()
        return self.finish(loop, state)

    def loop(self) -> Loop:
        """The loop of this run, at its first step."""
        session, config = self.session, self.config
        encoded = session.prepared.train
        loop = Loop(
            model=session.model,
            adapter=self.adapter,
            config=config,
            train=session.train_batches,
            origin=encoded.origin,
            tokens=lambda index: int(encoded.lengths[index]),
            evaluate=self.evaluate if session.prepared.evals else None,
            accelerator=session.accelerator,
            display=Display(self.narrator.console, 0, quiet=self.narrator.quiet),
            stop=self.stop,
            run=self.run,
            identity=identity(session, self.adapter),
        )
        loop.display.total = loop.total_steps
        for piece in self.adapter.pieces.values():
            if hasattr(piece, "begin"):  # a method with a schedule of its own
                piece.begin(loop.total_steps)
        return loop

    def evaluate(self, step: int) -> dict[str, dict[str, float]]:
        """Metrics of every held-out set; before the first step those of the base alone, where it has an answer.

        It has none with a task head that is new, nor for rows that hold virtual tokens; there it is the fresh adapter
        that is measured.
        """
        import inlay

        wording = self.session.wording
        reads = wording is None or wording == without_virtual_tokens(wording)
        if step > 0 or self.session.new_modules or not reads:
            return self.evaluator(step)
        with inlay.use(self.session.model, None):
            return self.evaluator(step)

    def begin(self, loop: Loop, start: Path | None, *, resume: bool) -> None:
        """Write the run folder, or take up its newest complete checkpoint."""
        skipped: list[str] = []
        if resume and start is None:
            start, skipped = runfolder.newest(self.run)
        for reason in skipped:
            self.narrator.fact("skipped", escape(reason))
        self.session.accelerator.wait_for_everyone()  # all have found it before the main process clears up
        changes = []
        if start is not None:
            then = checkpoint.read_state(start)["identity"]
            changes = checkpoint.differences(then, json.loads(json.dumps(loop.identity)))
            if changes and not self.config.allow_changed:
                checkpoint.refuse_changes(changes, start)
        if self.main:
            runfolder.write_start(self.run, self.config, self.session.prepared)
        if start is not None:
            if self.main:
                checkpoint.restore_run_files(start, self.run)
                self._drop_later(start)
            loop.resume(start)
            if self.main:
                runfolder.forget_after(self.run, loop.state.evaluated)
            loop.state.changes += [
                {"step": loop.state.step, "what": what, "was": was, "now": now} for what, was, now in changes
            ]
            self.narrator.fact("resumed", f"from {escape(str(start))}, step {loop.state.step} of {loop.total_steps}")
        elif self.main:
            for leftover in ("metrics.jsonl", "samples.jsonl"):
                (self.run / leftover).unlink(missing_ok=True)
        if self.main:
            loop.trackers = trackers.open_trackers(self.config.report_to, self.run, self.config.model_dump())

    def _drop_later(self, start: Path) -> None:
        """Going back to an earlier checkpoint ends what came after it."""
        step = int(start.name.removesuffix(folders.REPLACED).rpartition("-")[2])
        for path in checkpoint.candidates(self.run):
            if int(path.name.removesuffix(folders.REPLACED).rpartition("-")[2]) > step:
                folders.remove(path)

    def _samples(self) -> Samples | None:
        session, config = self.session, self.config
        if kind_of(session.task) != "generation" or not session.prepared.evals or not config.eval_samples:
            return None
        name, encoded = next(iter(session.prepared.evals.items()))
        decoding = Decoding(config.generation_max_new_tokens, config.generation_num_beams)
        return Samples(
            session.model,
            session.tokenizer,
            name,
            encoded,
            config.eval_samples,
            decoding,
            session.autocast,
            self.run / "samples.jsonl" if self.main else None,
            self.narrator,
            self.stop,
        )

    def _show_example(self) -> None:
        from inlay.data.show import show_row

        if not self.narrator.quiet:
            self.narrator.fact("example", "as the model sees it; what is learned stands out")
            console = self.narrator.console
            marks = not (console.is_terminal and console.color_system)
            row = show_row(self.session.prepared.train, 0, self.session.tokenizer, marks=marks)
            console.print(Padding(row, (0, 0, 0, INDENT)))

    # -- after the loop -----------------------------------------------------------------------------------------------

    def finish(self, loop: Loop, state: RunState) -> Result:
        """Keep the best adapter, measure what is left to measure, and write the report."""
        result = Result(self.run, state, trained_parameters=self.adapter.trained_parameters)
        title = self.adapter.method.title
        use_best = self.config.load_best_model_at_end and state.best_step is not None
        if self.main:
            self._keep_adapter(use_best=use_best)
        self.session.accelerator.wait_for_everyone()
        if state.untouched:
            result.results["untouched"] = state.untouched
        ours = dict(state.best if use_best else state.last)
        if use_best and state.best_step != state.step:
            self._take_best()
        if self.session.prepared.evals:
            if kind_of(self.session.task) == "generation":
                ours |= self._generation()
            elif self._compares():
                self.narrator.say("training the task head alone, to compare")
                result.results["head only"] = head_only(self.session, self.evaluator, loop)
            result.results[title] = ours
        result.adapter_bytes = runfolder.bytes_of(self.run / "adapter")
        result.commands = self._commands()
        if self.main:
            held_out = next(iter(self.session.prepared.evals.values()), None)
            batches = None  # gates are recorded by this process alone, which must then have the whole model
            if held_out is not None and not is_sharded(self.session.model):
                batches = self.session.eval_batches(held_out)
            if self.pictures:
                task, autocast = self.session.task, self.session.autocast
                result.pictures = insights.write(self.run, self.adapter, batches, task, autocast)
                report.plot(self.run, self.config.metric_for_best_model or MAIN[task])
            folders.replace_text(self.run / "README.md", report.card(self._facts(result, title)))
            folders.replace_text(self.run / "results.json", json.dumps(result.results, indent=1))
        self._tell(result, title)
        return result

    def _compares(self) -> bool:
        """Whether the task head alone is trained beside it: there is one, and this process has the whole model."""
        wanted = self.config.baseline and self.method != BASELINE_NAME
        return wanted and self.config.verbalizer is None and not is_sharded(self.session.model)

    def _keep_adapter(self, *, use_best: bool) -> None:
        if use_best:
            copy = partial(shutil.copytree, self.run / "best", dirs_exist_ok=True)
            folders.write_folder(self.run / "adapter", lambda folder: (copy(folder), None)[1], manifest=False)
        else:
            self.adapter.save(self.run / "adapter")

    def _take_best(self) -> None:
        """Put the best adapter in the place of the last one, for what is measured from here on."""
        from inlay.formats.native import refill

        refill(self.adapter, self.run / "adapter")

    def _generation(self) -> dict[str, float]:
        if not self.config.generation_metrics:
            return {}
        session, config = self.session, self.config
        self.narrator.say(f"generating for {config.generation_eval_rows} held-out prompts")
        decoding = Decoding(config.generation_max_new_tokens, config.generation_num_beams)
        encoded = next(iter(session.prepared.evals.values()))
        session.model.eval()
        return generation_metrics(
            session.model, session.tokenizer, encoded, config.generation_eval_rows, decoding, session.autocast
        )

    def _commands(self) -> list[str]:
        run, name = shlex.quote(str(self.run)), shlex.quote(str(self.run / "adapter"))
        generates = kind_of(self.session.task) == "generation"
        use = f'inlay generate {run} --prompt "..."' if generates else f'inlay predict {run} --text "..."'
        return [
            f"inlay eval {run}",
            use,
            f'python: inlay.load(model, "{name}")',
        ]

    def _tell(self, result: Result, title: str) -> None:
        state = result.state
        if result.results:
            self.narrator.results(result.results, self.session.task)
            self.narrator.gain(result.results, self.session.task, title)
        which = f"best of step {state.best_step}" if self.config.load_best_model_at_end and state.best_step else "last"
        self.narrator.fact(
            "adapter",
            f"{escape(str(self.run / 'adapter'))} ({which}), {report.size(result.adapter_bytes)} on disk; "
            f"trained in {state.seconds:.0f} s",
        )
        self.narrator.commands(result.commands)

    def _facts(self, result: Result, title: str) -> Mapping[str, Any]:
        import inlay
        from inlay.describe import base_parameters

        config, state, adapter = self.config, result.state, self.adapter
        data = config.data if isinstance(config.data, str) else ", ".join(config.data)
        env = runfolder.environment()
        shown = (
            "seed", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "optim",
            "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "bf16", "max_length",
        )  # fmt: skip
        return {
            "title": f"{title} for {Path(config.model).name}",
            "base": config.model,
            "task": self.session.task,
            "data": f"`{data}` ({self.session.prepared.format})",
            "method": repr(adapter.method),
            "method_name": self.method,
            "results": result.results,
            "trained": adapter.trained_parameters,
            "stored": adapter.stored_parameters,
            "base_parameters": base_parameters(self.session.model),
            "bytes": result.adapter_bytes,
            "training": f"{state.step:,} steps, {state.rows:,} rows, {state.tokens:,} tokens, {state.seconds:.0f} s",
            "settings": {key: getattr(config, key) for key in shown if getattr(config, key) is not None},
            "commands": [command for command in result.commands if not command.startswith("python")],
            "python": self._python(),
            "versions": ", ".join(f"{key} {env[key]}" for key in ("inlay", "torch", "python")),
            "citation": inlay.citation(adapter),
            "changes": state.changes,
            "pictures": result.pictures,
        }

    def _python(self) -> str:
        kind = models.kind_of(self.session.model.config)
        auto = models.auto_class(self.config, self.session.task, kind)
        labels = self.session.prepared.labels if self.config.verbalizer is None else None
        extra = f", num_labels={len(labels)}" if labels else ""
        return (
            f"import inlay\nfrom transformers import {auto}\n\n"
            f"model = {auto}.from_pretrained({self.config.model!r}{extra})\n"
            f'inlay.load(model, "{self.run / "adapter"}")'
        )
