"""The training loop, whole: groups of batches, one optimizer step each, and what happens between steps.

The gradient is that of Σ loss / Σ targets over a group, whatever the sizes of its batches, so g batches of b rows give
the gradient of one batch of g·b rows. With W processes a group is g·W consecutive batches of which each process takes
every W-th, and what is drawn at random for a batch follows from its place in the data: neither depends on W.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inlay import stepping
from inlay.config import RunConfig
from inlay.errors import TrainingError
from inlay.train import checkpoint
from inlay.train.checkpoint import Interrupted, RunState
from inlay.train.contracts import Adapter, Batch, Batches, Evaluate, EvaluationStopped
from inlay.train.distributed import Team, is_sharded
from inlay.train.guards import Guards, non_finite_rows
from inlay.train.metrics import MAIN, better, greater_is_better
from inlay.train.optim import build_optimizer, warmup_steps
from inlay.train.output_head import OutputHead
from inlay.train.precision import autocast
from inlay.train.progress import Display
from inlay.train.schedules import build_schedule
from inlay.train.signals import StopRequest
from inlay.train.trackers import Tracker


@dataclass(frozen=True, slots=True)
class Group:
    """What one optimizer step learns from: this process's batches, and the counts of all processes together."""

    own: list[Batch]
    batches: int
    targets: int
    rows: int
    tokens: int


class Loop:
    """One run of training.

    Args:
        model: the model with the adapter attached, on its device.
        adapter: what is trained.
        config: resolved: nothing that the loop reads is None.
        train: the batches.
        origin: row index -> where the row stands in the user's file.
        evaluate: measures the held-out sets, or None.
        accelerator: accelerate's engine, which knows the device and the other processes.
        display, trackers: who is told.
        stop: signals.
        run: the run folder; None keeps nothing (the baseline).
        identity: what must be equal on resume.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        adapter: Adapter,
        config: RunConfig,
        train: Batches,
        origin: Callable[[int], str],
        tokens: Callable[[int], int],
        evaluate: Evaluate | None,
        accelerator: Any,
        display: Display,
        trackers: Sequence[Tracker] = (),
        stop: StopRequest | None = None,
        run: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        assert config.task is not None, "the configuration was not resolved"
        self.config, self.task = config, config.task
        self.adapter, self.train, self.tokens = adapter, train, tokens
        self.evaluate = evaluate
        self.team, self.display, self.trackers = Team(accelerator), display, trackers
        self.stop = stop or StopRequest()
        self.run, self.identity = run, dict(identity or {})
        self.total_steps = total_steps(config, len(train), self.team.size)
        self.parameters = list(adapter.parameters())
        self.team.share_start(self.parameters)
        self.optimizer = build_optimizer(adapter, config)
        name, rising = config.lr_scheduler_type or "linear", warmup_steps(config, self.total_steps)
        self.schedule = build_schedule(self.optimizer, name, rising, self.total_steps, dict(config.lr_scheduler_kwargs))
        self.model, self.head = model, OutputHead(model, self.task)
        self.scaler = torch.amp.GradScaler(self.team.device.type) if config.fp16 else None
        self.guards = Guards(dict(adapter.named_parameters()), origin)
        self.state, self.rate = RunState(), 0.0
        self.metric = config.metric_for_best_model or MAIN[self.task]

    # -- the run ------------------------------------------------------------------------------------------------------

    def fit(self) -> RunState:
        """Train to the end. Raises `Interrupted` after a signal, once a checkpoint is on disk."""
        go_on = f"Go on from the newest checkpoint with: inlay train --resume {self.run}" if self.run else ""
        with self.team.watched(go_on):
            return self._fit()

    def _fit(self) -> RunState:
        state, first = self.state, self.state.step
        self.model.train()
        self._evaluate_if_due()
        self._save_or_stop()
        while state.step < self.total_steps and not state.stopped_early:
            began = time.monotonic()
            for group in self._groups():
                loss, norm = self._step(group)
                state.seconds += time.monotonic() - began
                self.guards.all_learn(state.step - first, self.total_steps, self.task)
                self._log(loss, norm)
                self._evaluate_if_due()
                self._save_or_stop()
                if state.step >= self.total_steps or state.stopped_early:
                    break
                began = time.monotonic()
            else:
                state.epoch, state.batch = state.epoch + 1, 0
        return state

    def _groups(self) -> Iterator[Group]:
        """The rest of this epoch, as much at a time as one optimizer step takes: this process's part of it."""
        team, size = self.team, self.config.gradient_accumulation_steps
        batches = self._own_batches()
        while True:
            own = list(itertools.islice(batches, size))
            for batch in own:
                self.guards.has_targets(batch.targets, batch.indices, self.state.step + 1, self.config.max_length)
            counts = [
                len(own),
                sum(batch.targets for batch in own),
                sum(len(batch.indices) for batch in own),
                sum(self.tokens(i) for batch in own for i in batch.indices),
            ]
            if team.size > 1:
                counts = team.sum(torch.tensor(counts, device=team.device)).tolist()
            if not counts[0]:
                return
            yield Group(own, *counts)

    def _own_batches(self) -> Iterator[Batch]:
        epoch, start = self.state.epoch, self.state.batch
        if self.team.size == 1:
            return self.train.epoch(epoch, start=start)
        return self.train.epoch(epoch, start=start + self.team.rank, step=self.team.size)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, group: Group) -> tuple[float, float]:
        """Forward, backward and update for one group; returns its mean loss and the norm of its gradient."""
        team, state = self.team, self.state
        parts: list[tuple[Sequence[Sequence[int]], Tensor]] = []
        total = torch.zeros((), device=team.device)
        for index, own in enumerate(group.own):
            seed_batch(self.config.seed, state.epoch, state.batch + index * team.size + team.rank)
            loss, loss_B = self._backward(own, 1.0 / group.targets)
            parts.append((own.rows, loss_B))
            total = total + loss
        if team.size > 1 and is_sharded(self.model):
            # Each pass gathers weights from all processes: one without a batch takes part with one that weighs nothing.
            for _ in range(-(-group.batches // team.size) - len(group.own)):
                self._backward(group.own[0] if group.own else next(self.train.epoch(0)), 0.0)
        team.sum_gradients(self.parameters)
        return self._apply(group, team.sum(total), parts)

    def _apply(
        self, group: Group, total: Tensor, parts: Sequence[tuple[Sequence[Sequence[int]], Tensor]]
    ) -> tuple[float, float]:
        """Update from the gradients of a group, given its summed loss, and its examples with the losses of the rows."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.scaler is None or self._no_overflow():
            stepping.prepare(self.optimizer)  # penalties are part of the gradient that is clipped
        norm = self._clip()
        mean, norm_value = torch.stack([total / group.targets, norm.to(total.device)]).tolist()
        if self.scaler is None or not math.isfinite(mean):  # a scaler skips a step whose gradient overflows
            step, rate = self.state.step + 1, float(self.schedule.get_last_lr()[0])
            self.guards.finite(mean, norm_value, step, lambda: non_finite_rows(parts), rate)
        self._update()
        self._count(group, mean * group.targets)
        return mean, norm_value

    def _backward(self, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
        """Add the gradient of `weight` times the summed loss of a batch; returns that sum, and the loss of each row."""
        with autocast(self.config, self.team.device):
            loss = self.head.loss(batch.inputs, self.config.label_smoothing_factor)
        scaled = loss.total * weight
        (self.scaler.scale(scaled) if self.scaler else scaled).backward()
        return loss.total.detach(), loss.per_row_B

    def _no_overflow(self) -> bool:
        """Whether all gradients are finite: a scaler skips the step otherwise, and a skipped step counts nowhere."""
        return bool(torch.nn.utils.get_total_norm(self._gradients()).isfinite())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`; returns their norm before that."""
        if self.config.max_grad_norm == 0:
            return torch.nn.utils.get_total_norm(self._gradients())
        return nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)

    def _update(self) -> None:
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        self.guards.note_gradients()
        self.optimizer.zero_grad(set_to_none=True)

    def _count(self, group: Group, loss_sum: float) -> None:
        state = self.state
        state.step += 1
        state.batch += group.batches
        state.rows += group.rows
        state.tokens += group.tokens
        state.loss_sum += loss_sum
        state.target_sum += group.targets

    # -- between steps ------------------------------------------------------------------------------------------------

    def _log(self, loss: float, norm: float) -> None:
        state, config = self.state, self.config
        assert config.logging_steps is not None, "the configuration was not resolved"
        logged = state.step % config.logging_steps == 0 or state.step == self.total_steps
        record = {
            "step": state.step,
            "epoch": state.epoch + state.batch / max(len(self.train), 1),
            "loss": state.loss_sum / state.target_sum if logged else loss,
            "grad_norm": norm,
            "learning_rate": self.rate,
            "rows": state.rows,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
        }
        speed = state.tokens / max(state.seconds, 1e-9)
        eta = state.seconds / state.step * (self.total_steps - state.step)
        self.display.step({**record, "tokens_per_second": speed, "eta": eta}, logged=logged)
        if logged:
            state.loss_sum, state.target_sum = 0.0, 0
            self._tell({"split": "train", **record})

    def _tell(self, record: Mapping[str, Any]) -> None:
        if self.team.main:
            for tracker in self.trackers:
                tracker.log(record)

    def _evaluate_if_due(self) -> None:
        """Evaluate before the first step, at every `eval_steps`, and at the end; each step once."""
        state, every = self.state, self.config.eval_steps
        if self.evaluate is None or every is None or state.evaluated == state.step:
            return
        if state.step % every and state.step != self.total_steps:
            return
        self.display.busy("evaluating")
        self.model.eval()
        try:
            results = self.evaluate(state.step)
        except EvaluationStopped:
            return  # `evaluated` stays behind, so a resumed run does it again
        finally:
            self.model.train()
        state.evaluated = state.step
        for name, metrics in results.items():
            self._tell({"split": name, "step": state.step, **metrics})
        self._judge(next(iter(results.values())))
        for index, (name, metrics) in enumerate(results.items()):
            self.display.evaluation(
                state.step,
                metrics,
                best=index == 0 and state.best_step == state.step > 0,
                name=name if len(results) > 1 else "",
            )

    def _judge(self, metrics: dict[str, float]) -> None:
        """Keep the best adapter; count the evaluations without a better one."""
        state, config = self.state, self.config
        state.last = metrics
        if state.step == 0:
            state.untouched = metrics
            return
        if self.metric not in metrics:
            raise TrainingError(
                f"metric_for_best_model: {self.metric!r} is not measured; there are {', '.join(metrics)}."
            )
        greater = config.greater_is_better if config.greater_is_better is not None else greater_is_better(self.metric)
        if better(self.metric, metrics[self.metric], state.best_metric, config.early_stopping_threshold, greater):
            state.not_better = 0
            if self._keep_best():
                state.best_metric, state.best_step, state.best = metrics[self.metric], state.step, metrics
        else:
            state.not_better += 1
            if config.early_stopping_patience is not None and state.not_better >= config.early_stopping_patience:
                state.stopped_early = True
                self.display.note(
                    f"stopped early: {state.not_better} evaluations without a better {self.metric} than "
                    f"{state.best_metric:.4g} at step {state.best_step}"
                )

    def _keep_best(self) -> bool:
        """Write the adapter as the best one; where the disk does not take it, the former one stays what counts."""
        failed = False
        if self.run is not None and self.team.main:
            try:
                self.adapter.save(self.run / "best")
            except OSError as error:
                failed = True
                self.display.note(
                    f"[bold red]the best adapter, of step {self.state.step}, could not be written: {error}[/]; "
                    "the one before it is whole, training goes on"
                )
        return not self.team.largest(int(failed))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_or_stop(self) -> None:
        """Write a checkpoint where one is due; after a signal to any process write one in any case, then end."""
        state, every = self.state, self.config.save_steps
        signum = self._signal()
        last = state.step == self.total_steps or state.stopped_early
        due = every is not None and state.step > 0 and (state.step % every == 0 or last)
        if self.run is not None and (due or signum):
            self.save(required=last or bool(signum))
        if signum:
            kept = f"; checkpoint-{state.step} is complete. Go on with: inlay train --resume {self.run}"
            raise Interrupted(f"signal {signum} at step {state.step}{kept if self.run is not None else ''}", signum)

    def _signal(self) -> int:
        """The signal that any of the processes has received, or 0."""
        return self.team.largest(self.stop.signum or 0)

    def save(self, *, required: bool = True) -> None:
        """Write a checkpoint of this step. Where that fails and is not required, say so and go on."""
        assert self.run is not None
        if self.team.main:
            try:
                checkpoint.write(
                    self.run,
                    self.state,
                    adapter=self.adapter,
                    optimizer=self.optimizer,
                    extra={
                        "schedule": self.schedule.state_dict(),
                        "scaler": self.scaler.state_dict() if self.scaler else {},
                        "config": self.config.model_dump(),
                    },
                    identity=self.identity,
                    keep=self.config.save_total_limit,
                )
            except OSError as error:
                message = f"the checkpoint of step {self.state.step} could not be written: {error}"
                if required:
                    raise TrainingError(f"{message}. Earlier checkpoints are whole.") from error
                self.display.note(f"[bold red]{message}[/]; earlier ones are whole, training goes on")
        self.team.wait()

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint of this run, bit for bit."""
        state, document = checkpoint.restore(folder, adapter=self.adapter, optimizer=self.optimizer)
        self.state = state
        self.schedule.load_state_dict(document["schedule"])
        if self.scaler:
            self.scaler.load_state_dict(document["scaler"])


def seed_batch(seed: int, epoch: int, batch: int) -> None:
    """Let what is drawn for a batch (dropout) follow from its place alone, whichever process it comes to."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, batch]).generate_state(1, np.uint64)[0]))


def total_steps(config: RunConfig, batches_per_epoch: int, processes: int = 1) -> int:
    """Optimizer steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    per_epoch = -(-batches_per_epoch // (config.gradient_accumulation_steps * processes))
    return max(1, math.ceil(config.num_train_epochs * per_epoch))
