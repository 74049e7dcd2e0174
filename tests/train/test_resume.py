"""N steps in one go equal k steps, an end of any kind, resume, N - k steps: bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.errors import CheckpointError
from inlay.train import checkpoint
from inlay.train.checkpoint import Interrupted
from inlay.train.loop import EvaluationStopped, Loop
from train.engine import Batch, Rows, loop

SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3.0,  # 7 batches an epoch: steps 4, 8 and 12 end one
    "eval_steps": 3,
    "save_steps": 2,
    "logging_steps": 3,
}
TOTAL = 12


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


class Recorded(Rows):
    """Keeps the rows given out, and calls `at` before each batch with its number since the start of this process."""

    def __init__(self, at: Any = None) -> None:
        super().__init__()
        self.order: list[list[int]] = []
        self.at = at

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(n, start):
            if self.at is not None:
                self.at(len(self.order))
            self.order.append(batch.indices)
            yield batch


def log(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def final(run: Loop) -> dict[str, torch.Tensor]:
    moments, _ = checkpoint.pack_optimizer(run.optimizer)
    return {**run.adapter.state_dict(), **moments}


def resumed(folder: Path, rows: Rows | None = None, **keys: Any) -> Loop:
    """A new process: everything is built anew, then the newest complete checkpoint is taken, if any."""
    found, _ = checkpoint.newest(folder)
    run = loop(folder, rows=rows, **(SETTINGS | keys))
    torch.manual_seed(12345)  # a new process has another random state
    if found is not None:
        checkpoint.restore_run_files(found, folder)
        run.resume(found)
    else:
        torch.manual_seed(0)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        return loop(folder, rows=rows, **(SETTINGS | keys))
    return run


def assert_equal_runs(one: Loop, other: Loop, folder: Path, reference: Path) -> None:
    mine, theirs = final(one), final(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    assert log(folder) == log(reference)
    assert (one.state.best_step, one.state.best_metric) == (other.state.best_step, other.state.best_metric)
    best = [(f / "best" / "adapter.safetensors").read_bytes() for f in (folder, reference)]
    assert best[0] == best[1]


@pytest.fixture(scope="module", params=["adamw_torch_fused", "sgd"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loop, Path, Recorded]:
    """The run in one go."""
    folder, rows = tmp_path_factory.mktemp("straight"), Recorded()
    run = loop(folder, rows=rows, optim=request.param, **SETTINGS)
    run.fit()
    assert run.state.step == TOTAL
    return run, folder, rows


@pytest.mark.parametrize("batch", range(21))
def test_killed_at_any_batch(straight, tmp_path, batch):
    """Batches 0 to 20: before the first step, in the middle of an accumulation, at the edges of epochs."""
    reference, reference_folder, given = straight

    def kill(number: int) -> None:
        if number == batch:
            raise Killed

    optim = reference.config.optim
    with pytest.raises(Killed):
        loop(tmp_path, rows=Recorded(kill), optim=optim, **SETTINGS).fit()
    rows = Recorded()
    again = resumed(tmp_path, rows, optim=optim)
    again.fit()
    assert_equal_runs(again, reference, tmp_path, reference_folder)
    assert rows.order == given.order[len(given.order) - len(rows.order) :]
    assert len(rows.order) <= len(given.order) - batch + 2 * 2 + 1  # no more than the steps since the last checkpoint


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("batch", [0, 1, 6, 7, 13])
def test_a_signal_at_any_batch_leaves_a_checkpoint_of_that_step(straight, tmp_path, batch, signum):
    reference, reference_folder, _ = straight
    optim = reference.config.optim
    rows = Recorded()
    run = loop(tmp_path, rows=rows, optim=optim, **SETTINGS)

    def ask(number: int) -> None:
        if number == batch:
            run.stop.signum = signum

    rows.at = ask
    with pytest.raises(Interrupted) as stopped:
        run.fit()
    assert stopped.value.exit_code == 128 + signum
    assert len(rows.order) <= batch + 2  # the rest of this accumulation, no further step
    found, skipped = checkpoint.newest(tmp_path)
    assert (found, skipped) == (tmp_path / f"checkpoint-{run.state.step}", [])
    again = resumed(tmp_path, optim=optim)
    assert again.state.step == run.state.step
    again.fit()
    assert_equal_runs(again, reference, tmp_path, reference_folder)


@pytest.mark.parametrize("step", [0, 3, 6, TOTAL])
def test_a_signal_inside_an_evaluation(straight, tmp_path, step):
    reference, reference_folder, _ = straight
    optim = reference.config.optim
    run = loop(tmp_path, optim=optim, **SETTINGS)
    measure = run.evaluate
    assert measure is not None

    def interrupted(now: int) -> dict[str, dict[str, float]]:
        if now == step:
            run.stop.signum = signal.SIGTERM
            raise EvaluationStopped
        return measure(now)

    run.evaluate = interrupted
    with pytest.raises(Interrupted):
        run.fit()
    assert run.state.step == step
    again = resumed(tmp_path, optim=optim)
    assert again.state.evaluated != step
    again.fit()
    assert_equal_runs(again, reference, tmp_path, reference_folder)


def test_a_finished_run_resumes_to_itself(straight, tmp_path):
    reference, reference_folder, _ = straight
    loop(tmp_path, optim=reference.config.optim, **SETTINGS).fit()
    again = resumed(tmp_path, optim=reference.config.optim)
    again.fit()
    assert_equal_runs(again, reference, tmp_path, reference_folder)


def test_early_stopping_counts_across_a_resume(tmp_path):
    keys = {
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 0.5,
        "num_train_epochs": 9.0,
        "early_stopping_patience": 4,
    }
    settings = SETTINGS | keys
    straight = loop(tmp_path / "a", **settings)
    straight.fit()
    assert straight.state.stopped_early
    middle = straight.state.step - 2
    run = loop(tmp_path / "b", **settings)

    def ask(number: int) -> None:
        if run.state.step == middle:
            run.stop.signum = signal.SIGTERM

    run.train.epoch = Recorded(ask).epoch
    with pytest.raises(Interrupted):
        run.fit()
    again = resumed(tmp_path / "b", **keys)
    again.fit()
    assert again.state.stopped_early
    assert_equal_runs(again, straight, tmp_path / "b", tmp_path / "a")


def test_another_optimizer_is_refused(tmp_path):
    loop(tmp_path, **SETTINGS).fit()
    found, _ = checkpoint.newest(tmp_path)
    other = loop(tmp_path, **(SETTINGS | {"weight_decay": 0.0}))
    other.optimizer.param_groups.pop()
    assert found is not None
    with pytest.raises(CheckpointError, match=r"other parameter groups: \[1, 1\] in the checkpoint, \[1\] now"):
        other.resume(found)
