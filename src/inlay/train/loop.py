"""The training loop, whole: groups of batches, one optimizer step each, and what happens between steps.

The gradient is that of Σ loss / Σ targets over a group, whatever the sizes of its batches, so g batches of b rows give
the gradient of one batch of g·b rows. With W processes a group is g·W consecutive batches of which each process takes
every W-th, so the order of the data does not depend on W.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inlay import stepping
from inlay.config import RunConfig
from inlay.errors import TrainingError
from inlay.train import checkpoint
from inlay.train.checkpoint import Interrupted, RunState
from inlay.train.guards import Guards, non_finite_rows
from inlay.train.loss import forward, loss_of
from inlay.train.metrics import MAIN, better, greater_is_better
from inlay.train.optim import build_optimizer, warmup_steps
from inlay.train.precision import autocast
from inlay.train.progress import Display
from inlay.train.schedules import build_schedule
from inlay.train.signals import StopRequest
from inlay.train.trackers import Tracker


class Batch(Protocol):
    """One batch: tensors for the model (with labels), the examples it holds, how many targets they have, and which of
    them stand in each row."""

    @property
    def inputs(self) -> dict[str, Tensor]: ...

    @property
    def indices(self) -> list[int]: ...

    @property
    def targets(self) -> int: ...

    @property
    def rows(self) -> list[list[int]]: ...


class Batches(Protocol):
    """The training data: `epoch(n, start)` yields the same batches for the same n, from batch `start` on."""

    def __len__(self) -> int: ...

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]: ...


class Adapter(Protocol):
    """What the loop needs of the adapter that it trains."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any: ...

    def save(self, path: Path) -> Any: ...


class EvaluationStopped(Exception):
    """A signal came while evaluating; the evaluation will be done again on resume."""


Evaluate = Callable[[int], dict[str, dict[str, float]]]
"""step -> metrics of each held-out set; must not touch any random state."""


class Loop:
    """One run of training.

    Args:
        model: the model with the adapter attached, on its device.
        adapter: what is trained.
        config: resolved: nothing that the loop reads is None.
        train: the batches.
        origin: row index -> where the row stands in the user's file.
        evaluate: measures the held-out sets, or None.
        accelerator: accelerate's engine.
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
        self.accelerator, self.display, self.trackers = accelerator, display, trackers
        self.stop = stop or StopRequest()
        self.run, self.identity = run, dict(identity or {})
        self.total_steps = total_steps(config, len(train), accelerator.num_processes)
        self.parameters = list(adapter.parameters())
        self.optimizer = build_optimizer(adapter, config)
        name, rising = config.lr_scheduler_type or "linear", warmup_steps(config, self.total_steps)
        self.schedule = build_schedule(self.optimizer, name, rising, self.total_steps, dict(config.lr_scheduler_kwargs))
        self.model: nn.Module = accelerator.prepare_model(model) if accelerator.num_processes > 1 else model
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if config.fp16 else None
        self.guards = Guards(dict(adapter.named_parameters()), origin)
        self.state, self.rate = RunState(), 0.0
        self.metric = config.metric_for_best_model or MAIN[self.task]

    # -- the run ------------------------------------------------------------------------------------------------------

    def fit(self) -> RunState:
        """Train to the end. Raises `Interrupted` after a signal, once a checkpoint is on disk."""
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

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of the rest of this epoch, as many at a time as one optimizer step takes."""
        size = self.config.gradient_accumulation_steps * self.accelerator.num_processes
        batches = self.train.epoch(self.state.epoch, start=self.state.batch)
        while group := list(itertools.islice(batches, size)):
            yield group

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, group: list[Batch]) -> tuple[float, float]:
        """Forward, backward and update for one group; returns its mean loss and the norm of its gradient."""
        for batch in group:
            self.guards.has_targets(batch.targets, batch.indices, self.state.step + 1, self.config.max_length)
        targets = sum(batch.targets for batch in group)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine: list[Batch | None] = list(group[rank::world])
        mine += [None] * (-(-len(group) // world) - len(mine))
        parts: list[tuple[Sequence[Sequence[int]], Tensor]] = []
        total = torch.zeros((), device=self.accelerator.device)
        for index, own in enumerate(mine):
            with self._last_one_syncs(index == len(mine) - 1):
                # A process without a batch of its own takes part with one that weighs nothing.
                inputs = (group[0] if own is None else own).inputs
                with autocast(self.config, self.accelerator.device):
                    output = forward(self.model, inputs, self.task)
                    loss = loss_of(output, inputs, self.task, self.config.label_smoothing_factor)
                scaled = loss.total * (world / targets if own is not None else 0.0)
                (self.scaler.scale(scaled) if self.scaler else scaled).backward()
                if own is not None:
                    parts.append((own.rows, loss.per_row_B))
                    total = total + loss.total.detach()
                del output, loss, scaled
        total = self.accelerator.reduce(total, "sum")
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.scaler is None or self._no_overflow():
            stepping.prepare(self.optimizer)  # penalties are part of the gradient that is clipped
        norm = self._clip()
        mean, norm_value = torch.stack([total / targets, norm.to(total.device)]).tolist()
        if self.scaler is None or not math.isfinite(mean):  # a scaler skips a step whose gradient overflows
            step, rate = self.state.step + 1, float(self.schedule.get_last_lr()[0])
            self.guards.finite(mean, norm_value, step, lambda: non_finite_rows(parts), rate)
        self._update()
        self._count(group, mean * targets, targets)
        return mean, norm_value

    def _last_one_syncs(self, last: bool) -> AbstractContextManager[Any]:
        if last or self.accelerator.num_processes == 1:
            return nullcontext()
        return self.accelerator.no_sync(self.model)  # type: ignore[no-any-return]

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

    def _count(self, group: list[Batch], loss_sum: float, targets: int) -> None:
        state = self.state
        state.step += 1
        state.batch += len(group)
        state.rows += sum(len(batch.indices) for batch in group)
        state.tokens += sum(self.tokens(i) for batch in group for i in batch.indices)
        state.loss_sum += loss_sum
        state.target_sum += targets

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
        if self.accelerator.is_main_process:
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
            state.best_metric, state.best_step, state.best = metrics[self.metric], state.step, metrics
            state.not_better = 0
            if self.run is not None and self.accelerator.is_main_process:
                self.adapter.save(self.run / "best")
        else:
            state.not_better += 1
            if config.early_stopping_patience is not None and state.not_better >= config.early_stopping_patience:
                state.stopped_early = True
                self.display.note(
                    f"stopped early: {state.not_better} evaluations without a better {self.metric} than "
                    f"{state.best_metric:.4g} at step {state.best_step}"
                )

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
        signum = self.stop.signum or 0
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([signum], device=self.accelerator.device)
            signum = int(self.accelerator.gather(flag).max())
        return signum

    def save(self, *, required: bool = True) -> None:
        """Write a checkpoint of this step. Where that fails and is not required, say so and go on."""
        assert self.run is not None
        if self.accelerator.is_main_process:
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
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint of this run, bit for bit."""
        state, document = checkpoint.restore(folder, adapter=self.adapter, optimizer=self.optimizer)
        self.state = state
        self.schedule.load_state_dict(document["schedule"])
        if self.scaler:
            self.scaler.load_state_dict(document["scaler"])


def total_steps(config: RunConfig, batches_per_epoch: int, processes: int = 1) -> int:
    """Optimizer steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    per_epoch = -(-batches_per_epoch // (config.gradient_accumulation_steps * processes))
    return max(1, math.ceil(config.num_train_epochs * per_epoch))
