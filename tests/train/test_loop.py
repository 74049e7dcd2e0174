"""The promises of the loop: exact accumulation, nothing passes in silence, early stop and best on any metric."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inlay import stepping
from inlay.errors import TrainingError
from inlay.train.checkpoint import newest
from inlay.train.guards import non_finite_rows
from train.engine import Batch, HeadAdapter, Rows, loop


def records(run: Path, split: str = "train") -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


@pytest.mark.parametrize("accumulation", [2, 3, 5])
def test_accumulated_gradient_is_that_of_one_large_batch(accumulation):
    """Rows have 3 to 9 targets, so a mean of batch means would differ."""
    keys = {"optim": "sgd", "max_steps": 4, "max_grad_norm": 0.0, "weight_decay": 0.0, "dropout": 0.0}
    large = loop(rows=Rows(30, 3 * accumulation, shuffle=False), **keys)
    small = loop(rows=Rows(30, 3, shuffle=False), gradient_accumulation_steps=accumulation, **keys)
    start = large.adapter.state_dict()["head.weight"].clone()
    large.fit()
    small.fit()
    for name, tensor in large.adapter.state_dict().items():
        torch.testing.assert_close(small.adapter.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert (large.adapter.state_dict()["head.weight"] - start).abs().max() > 1e-3


def test_the_logged_loss_is_the_mean_over_targets_since_the_last_line(tmp_path):
    fine = loop(tmp_path / "fine", max_steps=6, logging_steps=1, optim="sgd", learning_rate=1e-12, dropout=0.0)
    coarse = loop(tmp_path / "coarse", max_steps=6, logging_steps=3, optim="sgd", learning_rate=1e-12, dropout=0.0)
    fine.fit()
    coarse.fit()
    rows = Rows()
    targets = [batch.targets for batch in rows.epoch(0)][:6]
    losses = [record["loss"] for record in records(tmp_path / "fine")]
    for line, part in zip(records(tmp_path / "coarse"), (slice(0, 3), slice(3, 6)), strict=True):
        mean = sum(a * b for a, b in zip(losses[part], targets[part], strict=True)) / sum(targets[part])
        assert line["loss"] == pytest.approx(mean, abs=1e-6)


def test_epochs_end_with_a_smaller_group_and_the_total_follows():
    run = loop(rows=Rows(20, 3), gradient_accumulation_steps=4, num_train_epochs=2.0)  # 7 batches: groups of 4 and 3
    assert run.total_steps == 4
    state = run.fit()
    assert (state.step, state.rows) == (4, 40)


class Poisoned(Rows):
    """Row 7 holds an infinity."""

    def __init__(self) -> None:
        super().__init__(shuffle=False)
        self.x[7][0, 0] = math.inf


def test_a_loss_that_is_not_a_number_stops_with_step_row_and_cause():
    run = loop(rows=Poisoned())
    run.model.base.weight.data[0, 0] = 0.0  # 0 · inf
    before = {k: v.clone() for k, v in run.adapter.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 3: loss nan.*Cause: the adapter is finite.*Rows: train\.jsonl:8\."):
        run.fit()
    assert all(v.isfinite().all() for v in run.adapter.state_dict().values())
    assert not all(torch.equal(before[k], v) for k, v in run.adapter.state_dict().items())  # steps 1 and 2 were made


def test_of_packed_rows_the_examples_of_the_bad_row_are_named():
    fine, bad = torch.tensor([0.5, 0.7]), torch.tensor([0.1, math.nan, 0.2])
    parts = [([[4, 9], [1]], fine), ([[3], [2, 8, 5], [0, 7]], bad)]
    assert non_finite_rows(parts) == [2, 8, 5]
    assert non_finite_rows(parts[:1]) == [4, 9, 1]


def test_an_adapter_that_blew_up_is_named_as_the_cause():
    run = loop()
    run.parameters[0].data[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"the adapter is no longer finite \(head\.weight\): lower learning_rate"):
        run.fit()


class Masked(Rows):
    """The rows of the second batch have no labels."""

    def rows(self, indices: list[int]) -> Batch:
        batch = super().rows(indices)
        if 4 in indices:
            batch.inputs["labels"][:] = -100
            batch.targets = 0
        return batch


def test_a_batch_without_a_single_label_is_an_error_not_a_loss_of_zero():
    with pytest.raises(
        TrainingError, match=r"step 2: .*all labels are masked.*train\.jsonl:4; train\.jsonl:5; train\.jsonl:6"
    ):
        loop(rows=Masked(shuffle=False)).fit()


def test_a_tensor_that_never_receives_a_gradient_is_named():
    run = loop(num_train_epochs=4.0)
    idle = torch.nn.Parameter(torch.zeros(2))
    run.guards.parameters["blocks.9.q.A"] = idle
    run.guards.without_gradient.add("blocks.9.q.A")
    with pytest.raises(
        TrainingError, match=r"step 8: 1 of 3 adapter tensors never received a gradient: blocks\.9\.q\.A"
    ):
        run.fit()


def test_early_stopping_and_best_follow_the_metric(tmp_path):
    """With a rate this high the held-out loss only rises after the first evaluations."""
    run = loop(
        tmp_path / "run",
        eval_steps=2,
        save_steps=100,
        learning_rate=0.5,
        num_train_epochs=30.0,
        early_stopping_patience=3,
    )
    state = run.fit()
    held_out = {int(r["step"]): r["loss"] for r in records(tmp_path / "run", "held-out")}
    trained = {step: loss for step, loss in held_out.items() if step > 0}
    assert state.stopped_early
    assert state.best_step == min(trained, key=trained.__getitem__)
    assert state.step == state.best_step + 2 * 3
    best = load_file(tmp_path / "run" / "best" / "adapter.safetensors")
    now = run.adapter.state_dict()
    assert not torch.equal(best["head.weight"], now["head.weight"])
    assert newest(tmp_path / "run")[0] == tmp_path / "run" / f"checkpoint-{state.step}"


def test_a_metric_that_is_not_measured_is_an_error():
    with pytest.raises(TrainingError, match="metric_for_best_model: 'bleu' is not measured; there are loss"):
        loop(eval_steps=2, metric_for_best_model="bleu").fit()


def test_a_penalty_is_part_of_what_is_clipped(tmp_path):
    class Penalised(stepping.Stepped, torch.nn.Module):
        def __init__(self, parameters):
            super().__init__()
            self.__dict__["own"] = parameters
            stepping.watch(self)

        def stepped_parameters(self):
            return iter(self.own)

        def before_step(self, grad_scale):
            for parameter in self.own:
                parameter.grad += 1000.0 * grad_scale

    keys = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0, "adam_beta1": 0.0, "warmup_ratio": 0.0}
    penalised = loop(tmp_path / "run", max_grad_norm=0.5, learning_rate=1.0, **keys)
    keep = Penalised(penalised.parameters)
    before = [p.detach().clone() for p in penalised.parameters]
    penalised.fit()
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(penalised.parameters, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)
    assert records(tmp_path / "run")[0]["grad_norm"] > 1000
    del keep


def test_label_smoothing_raises_the_loss_of_a_sure_model(tmp_path):
    losses = {}
    for smoothing in (0.0, 0.2):
        run = loop(tmp_path / str(smoothing), max_steps=1, label_smoothing_factor=smoothing, dropout=0.0)
        run.fit()
        losses[smoothing] = records(tmp_path / str(smoothing))[0]["loss"]
    batch = next(Rows().epoch(0))
    torch.manual_seed(0)
    fresh = loop(dropout=0.0)
    with torch.no_grad():
        logits = fresh.model(batch.inputs["x"]).logits.log_softmax(-1)[batch.inputs["labels"] != -100]
    gold = batch.inputs["labels"][batch.inputs["labels"] != -100]
    by_hand = -(0.8 * logits.gather(1, gold[:, None]).mean() + 0.2 * logits.mean())
    assert losses[0.2] == pytest.approx(float(by_hand), abs=1e-5)
    assert losses[0.0] != pytest.approx(losses[0.2], abs=1e-3)


def test_evaluation_leaves_the_training_untouched():
    """Dropout's random stream is the same with and without evaluations."""
    with_eval = loop(eval_steps=1)
    with_eval.fit()
    without = loop()
    without.fit()
    for name, tensor in without.adapter.state_dict().items():
        assert torch.equal(with_eval.adapter.state_dict()[name], tensor)


class Unwritable(HeadAdapter):
    """The disk is full at the second save."""

    saves = 0

    def save(self, path: Path) -> None:
        type(self).saves += 1
        if type(self).saves == 2:
            raise OSError(28, "No space left on device")
        super().save(path)


def test_a_full_disk_in_the_middle_keeps_the_old_checkpoint_and_goes_on(tmp_path):
    run = loop(tmp_path / "run", save_steps=2, max_steps=7)
    Unwritable.saves = 0
    run.adapter = Unwritable(run.model)
    notes: list[str] = []
    run.display.note = notes.append
    state = run.fit()
    assert state.step == 7
    assert "checkpoint of step 4 could not be written" in notes[0]
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-6", "checkpoint-7"]


def test_a_full_disk_at_the_end_is_an_error(tmp_path):
    run = loop(tmp_path / "run", save_steps=3, max_steps=6)
    Unwritable.saves = 0
    run.adapter = Unwritable(run.model)
    with pytest.raises(
        TrainingError, match=r"step 6 could not be written: .*No space left.*Earlier checkpoints are whole"
    ):
        run.fit()
    path, skipped = newest(tmp_path / "run")
    assert path is not None
    assert (path.name, skipped) == ("checkpoint-3", [])


class Recorded(Rows):
    """Keeps the order in which rows were given out."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[list[int]] = []

    def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(n, start):
            self.order.append(batch.indices)
            yield batch


def test_each_epoch_has_its_own_order_and_every_row_once():
    data = Recorded()
    loop(rows=data, num_train_epochs=2.0).fit()
    first, second = (list(itertools.chain(*part)) for part in (data.order[:7], data.order[7:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
