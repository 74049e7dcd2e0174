"""Several runs in one pass over the frozen base: the same batch once for each run, each row with its run's adapter.

The rows of different runs never meet, so the gradient of the summed loss is each adapter's own. Clipping, optimizer,
schedule, evaluation and checkpoints are those of the run's own loop. What the base draws at random (dropout) is drawn
again for each run from the same state, so that every run sees what it would see alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import inlay
from inlay.train.checkpoint import Interrupted
from inlay.train.contracts import Batch
from inlay.train.loop import Group, Loop, seed_batch

FULL = 512
"""Tokens that fill a CPU. A pass of more gains nothing and outgrows its caches: 8 runs of 512 took 1.08 of the time."""


@dataclass(frozen=True)
class Member:
    """One of the runs: the name its adapter is attached under, and its loop."""

    name: str
    loop: Loop


def fit(model: nn.Module, members: Sequence[Member]) -> None:
    """Train all runs to their ends; they stand at the same step of the same data.

    Raises:
        Interrupted: a signal came; every run has a checkpoint.
        TrainingError: one of the runs must not go on; the others have their checkpoints.
    """
    lead = members[0].loop
    first = lead.state.step
    with torch.no_grad():
        # What the loss looks up about the model once, it looks up on one row; later batches have a row for each run.
        inlay.use(model, members[0].name)
        lead.head.loss(next(lead.train.epoch(0)).inputs, 0.0)
    _between_steps(model, members)
    while running := [m for m in members if _goes_on(m.loop)]:
        lead = running[0].loop
        began = time.monotonic()
        for group in lead._groups():
            logs = _step(model, running, group)
            for member, (loss, norm) in zip(running, logs, strict=True):
                loop = member.loop
                loop.state.seconds += (time.monotonic() - began) / len(running)
                loop.guards.all_learn(loop.state.step - first, loop.total_steps, loop.task)
                loop._log(loss, norm)
            _between_steps(model, running)
            if not all(_goes_on(m.loop) for m in running):
                break
            began = time.monotonic()
        else:
            for member in running:
                member.loop.state.epoch, member.loop.state.batch = member.loop.state.epoch + 1, 0
    inlay.use(model, tuple(m.name for m in members[:1]))


def _goes_on(loop: Loop) -> bool:
    return loop.state.step < loop.total_steps and not loop.state.stopped_early


def _between_steps(model: nn.Module, members: Sequence[Member]) -> None:
    """Evaluate and save each run; after a signal all are saved before the first one's `Interrupted` goes up."""
    stopped: Interrupted | None = None
    for member in members:
        inlay.use(model, member.name)
        model.train()
        member.loop._evaluate_if_due()
        try:
            member.loop._save_or_stop()
        except Interrupted as error:
            stopped = stopped or error
    if stopped is not None:
        raise stopped


def _step(model: nn.Module, running: Sequence[Member], group: Group) -> list[tuple[float, float]]:
    """One optimizer step of every run."""
    lead, runs = running[0].loop, len(running)
    totals = [torch.zeros((), device=lead.team.device) for _ in running]
    parts: list[list[tuple[Sequence[Sequence[int]], Tensor]]] = [[] for _ in running]
    for index, own in enumerate(group.own):
        rows = len(own.rows)
        for some in passes(runs, _tokens(own), lead.team.device):
            seed_batch(lead.config.seed, lead.state.epoch, lead.state.batch + index)
            names = [running[number].name for number in some]
            inlay.use(model, names[0] if len(names) == 1 else [name for name in names for _ in range(rows)])
            with AlikeForEach(len(some), rows):
                _, loss_B = lead._backward(_repeated(own, len(some)), 1.0 / group.targets)
            for number, mine_B in zip(some, loss_B.split(rows), strict=True):
                totals[number] = totals[number] + mine_B.sum()
                parts[number].append((own.rows, mine_B))
    return [m.loop._apply(group, total, part) for m, total, part in zip(running, totals, parts, strict=True)]


def passes(runs: int, tokens: int, device: torch.device) -> list[range]:
    """Which runs share a pass, where each brings so many tokens: all of them, on a CPU until it is full.

    >>> passes(8, 200, torch.device("cpu"))
    [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    """
    most = max(1, FULL // max(tokens, 1)) if device.type == "cpu" else runs
    return [range(at, min(at + most, runs)) for at in range(0, runs, most)]


def _tokens(batch: Batch) -> int:
    """How many a batch has, padding included."""
    return max((t.shape[:2].numel() for t in batch.inputs.values() if t.ndim > 1), default=len(batch.rows))


def _repeated(batch: Batch, times: int) -> Any:
    """The batch once for each run."""
    inputs = {name: torch.cat([tensor] * times) for name, tensor in batch.inputs.items()}
    return dataclasses.replace(batch, inputs=inputs, rows=list(batch.rows) * times)  # type: ignore[type-var]


class AlikeForEach(TorchFunctionMode):
    """Within it, dropout over `runs` times `rows` rows draws the same for each run, as if it were alone."""

    def __init__(self, runs: int, rows: int) -> None:
        super().__init__()
        self.runs, self.entries = runs, runs * rows

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = function in (F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d) or (
            function is F.scaled_dot_product_attention and _attention_dropout(args, kwargs) > 0
        )
        first = args[0] if args else None
        if not draws or not isinstance(first, Tensor) or first.ndim == 0 or first.shape[0] % self.entries:
            return function(*args, **kwargs)
        return self._each(function, first.shape[0], args, kwargs)

    def _each(self, function: Callable[..., Any], entries: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        devices = [a.device for a in args if isinstance(a, Tensor) and a.is_cuda]
        state = torch.cuda.get_rng_state(devices[0]) if devices else torch.get_rng_state()
        size = entries // self.runs

        def part(value: Any, number: int) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == entries
            return value[number * size : (number + 1) * size] if whole else value

        results = []
        for number in range(self.runs):
            if devices:
                torch.cuda.set_rng_state(state, devices[0])
            else:
                torch.set_rng_state(state)
            mine = {name: part(value, number) for name, value in kwargs.items()}
            results.append(function(*(part(value, number) for value in args), **mine))
        return torch.cat(results)


def _attention_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
