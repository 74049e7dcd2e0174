"""What `inlay train` prints before and after the loop: what was found, the plan, the result, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from inlay.describe import base_parameters
from inlay.train import memory
from inlay.train.defaults import kind_of
from inlay.train.distributed import is_sharded
from inlay.train.metrics import HIGHER_IS_BETTER, MAIN
from inlay.train.optim import warmup_steps
from inlay.train.report import size
from inlay.train.session import Session
from inlay.train.wording import told, words_of

INDENT = 11


class Narrator:
    """Prints to one console, or to none."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet

    def say(self, text: str) -> None:
        """A passing remark."""
        self._print(f"[dim]{escape(text)} ...[/]")

    def fact(self, title: str, *lines: str) -> None:
        """A named fact of one line or more."""
        for index, line in enumerate(lines):
            head = f"[bold]{title:<{INDENT - 1}}[/] " if index == 0 else " " * INDENT
            self._print(head + line)

    def found(self, session: Session) -> None:
        """What was detected in the data."""
        prepared, report = session.prepared, session.prepared.report
        held_out = ", ".join(f"{name} {len(rows):,}" for name, rows in prepared.evals.items()) or "nothing"
        facts = [f"{len(prepared.train):,} examples to train on; held out: {held_out}"]
        if prepared.labels is not None:
            facts.append(f"{len(prepared.labels)} classes: {_few(prepared.labels)}")
        if report.lengths:
            median, longest = report.lengths["median"], report.lengths["max"]
            facts.append(f"tokens per example: median {median:.0f}, longest {longest:.0f} (limit {report.max_length})")
        self.fact("data", escape(prepared.format), *map(escape, facts), *map(escape, report.lines()))

    def plan(self, session: Session, adapter: Any, total_steps: int, run: Path) -> None:
        """What will be trained, for how long, and what it will need, which takes a second to find out."""
        if self.quiet:
            return
        config, model = session.config, session.model
        base = base_parameters(model)
        trained, stored, head = adapter.trained_parameters, adapter.stored_parameters, adapter.head_parameters
        parts = f" (task head {head:,})" if head else ""
        processes = session.accelerator.num_processes
        batches = config.gradient_accumulation_steps * processes
        rows = (config.per_device_train_batch_size or 0) * batches
        epochs = total_steps / max(len(session.train_batches) / batches, 1)
        precision = ("bf16 autocast, " if config.bf16 else "fp16 autocast, " if config.fp16 else "") + (
            f"{config.quantization} weights" if config.quantization else f"{str(model.dtype)[6:]} weights"
        )
        if is_sharded(model):
            memory_needed = f"weights shared by {processes} processes"
        else:
            memory_needed = _memory(session)
        own = f" (task head {config.head_learning_rate:g})" if config.head_learning_rate is not None else ""
        new = f"new weights, trained with it: {', '.join(session.new_modules)}" if session.new_modules else ""
        words = words_of(config, session.tokenizer, session.prepared.labels)
        said = f"{config.template!r} -> {told(words, session.tokenizer)}" if words is not None else ""
        self.fact("method", escape(repr(adapter.method)), *(escape(text) for text in (new, said) if text))
        self.fact(
            "plan",
            f"{trained:,} parameters are trained{parts}, {stored:,} stored; the base has {base:,} "
            f"([bold]{100 * trained / max(base, 1):.2f} %[/])",
            f"{total_steps:,} steps of {rows} rows, about {epochs:.1f} epochs; "
            f"learning_rate {config.learning_rate:g}{own}, "
            f"{config.lr_scheduler_type} after {warmup_steps(config, total_steps)} steps of warm-up; {config.optim}",
            f"{session.device}, {precision}; {memory_needed}",
            f"run folder [bold]{escape(str(run))}[/]",
        )

    def results(self, results: Mapping[str, Mapping[str, float]], task: str) -> None:
        """The comparison at the end, better values marked."""
        columns = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
        main = MAIN[task]
        columns.sort(key=lambda name: (name != main, name != "loss"))
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("held-out")
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for name, metrics in results.items():
            table.add_row(name, *(cell(metrics, column, results) for column in columns))
        self._print("")
        if not self.quiet:
            # Off a terminal nothing is cut: a log has no width.
            needed = 24 + 14 * len(columns)
            self.console.print(table, width=None if self.console.is_terminal else max(self.console.width, needed))

    def gain(self, results: Mapping[str, Mapping[str, float]], task: str, trained: str) -> None:
        """One sentence on what the adapter brought."""
        main = MAIN[task]
        other = "head only" if "head only" in results else "untouched"
        if other not in results or main not in results[trained] or main not in results[other]:
            return
        ours, theirs = results[trained][main], results[other][main]
        if kind_of(task) == "generation":
            self._print(f"{trained} lowers the {main} from {theirs:.3f} to {ours:.3f}.")
        elif main in HIGHER_IS_BETTER:
            points = 100 * (ours - theirs)
            where = "above" if points >= 0 else "below"
            self._print(f"{trained} is [bold]{abs(points):.1f} points[/] of {main} {where} {other}.")

    def commands(self, commands: Sequence[str]) -> None:
        """What to type next."""
        self._print("\n[bold]Next[/]")
        for command in commands:
            self._print(f"  {escape(command)}")

    def _print(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)


def _memory(session: Session) -> str:
    """What a step will take; where that cannot be worked out, why."""
    config, inputs = session.config, session.train_batches.batch(0, 0).inputs
    try:
        needed = memory.estimate(
            session.model,
            inputs,
            session.task,
            config.optim,
            autocast=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None,
            checkpointing=config.gradient_checkpointing,
            accumulates=config.gradient_accumulation_steps > 1,
        )
    except Exception as error:  # a model of one's own may do what tensors without values cannot
        reason = str(error).strip().partition("\n")[0]
        return escape(f"its memory could not be told in advance ({type(error).__name__}: {reason})")
    return (
        f"about {size(needed.total)} of memory: weights {size(needed.weights)}, gradients {size(needed.gradients)}, "
        f"optimizer {size(needed.optimizer)}, activations {size(needed.activations)}, scratch {size(needed.scratch)}"
    )


def cell(metrics: Mapping[str, float], name: str, results: Mapping[str, Mapping[str, float]]) -> str:
    """One value of the table, bold where it is the best of its column."""
    if name not in metrics:
        return ""
    values = [row[name] for row in results.values() if name in row]
    best = max(values) if name in HIGHER_IS_BETTER else min(values)
    text = f"{metrics[name]:.4g}"
    return f"[bold]{text}[/]" if metrics[name] == best and len(values) > 1 else text


def escape(text: str) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
