"""Batches: every example once per epoch, the same in every run, entered anywhere; and what the tensors hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.data.batches import Batches, collate, count_targets, pad_prompts
from inlay.data.encoded import Encoded, Mixture
from inlay.data.examples import MASKED, Example
from inlay.data.labels import Labels
from inlay.data.store import Counts, Making, Placed, in_memory
from inlay.errors import DataError

lengths = st.lists(st.integers(2, 12), min_size=1, max_size=40)


def encoded_of(sizes: list[int], *, packing: bool = False, mixture: Mixture | None = None) -> Encoded:
    """Causal examples of these lengths; the tokens of example i are all 3 + i."""
    placed = (
        Placed(Example([3 + i] * size, [MASKED] + [3 + i] * (size - 1)), i, 0, i + 2) for i, size in enumerate(sizes)
    )
    store = in_memory(Making(placed, Counts(rows=len(sizes)), {}, {"a.csv": 0}))
    return Encoded([store], "causal-lm", Labels(), 16, packing=packing, mixture=mixture)


def batches_of(encoded: Encoded, batch_size: int = 3, **options: Any) -> Batches:
    settings: dict[str, Any] = {"seed": 1, "shuffle": True, "pad_token_id": 0, "task": "causal-lm"}
    return Batches(encoded, batch_size, **(settings | options))


def seen(batches: Batches, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.indices for batch in batches.epoch(epoch, start)]


@given(lengths, st.integers(1, 7), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_every_example_once_per_epoch(
    sizes: list[int], batch_size: int, shuffle: bool, grouped: bool, packing: bool, epoch: int
) -> None:
    batches = batches_of(encoded_of(sizes, packing=packing), batch_size, shuffle=shuffle, group_by_length=grouped)
    plan = seen(batches, epoch)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    assert len(plan) == len(batches)
    targets = sum(batch.targets for batch in batches.epoch(epoch))
    assert targets == sum(size - 1 for size in sizes)


@given(lengths, st.integers(1, 5), st.booleans(), st.integers(0, 3), st.data())
def test_an_epoch_can_be_entered_at_any_batch(
    sizes: list[int], batch_size: int, packing: bool, epoch: int, data: st.DataObject
) -> None:
    encoded = encoded_of(sizes, packing=packing)
    whole = seen(batches_of(encoded, batch_size), epoch)
    start = data.draw(st.integers(0, len(whole)))
    again = batches_of(encoded_of(sizes, packing=packing), batch_size)
    assert seen(again, epoch, start) == whole[start:]
    first, second = list(batches_of(encoded, batch_size).epoch(epoch, start)), list(again.epoch(epoch, start))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)


def test_order_depends_on_seed_and_epoch() -> None:
    encoded = encoded_of(list(range(2, 14)) * 5)
    orders = {(seed, epoch): str(seen(batches_of(encoded, seed=seed), epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    packed = batches_of(encoded_of(list(range(2, 14)) * 5, packing=True))
    assert seen(packed, 0) != seen(packed, 1)
    assert len(packed.plan(0)) == len(packed.plan(1))
    fixed = batches_of(encoded, shuffle=False)
    assert seen(fixed, 0) == seen(fixed, 7)


def test_rows_of_like_length_share_a_batch_and_the_longest_comes_first() -> None:
    sizes = [2, 12, 3, 11, 4, 10, 5, 9, 6, 8] * 10
    batches = list(batches_of(encoded_of(sizes), 5, pad_to_multiple_of=1).epoch(0))
    padded = sum(batch.inputs["input_ids"].numel() for batch in batches)
    assert padded < 1.1 * sum(sizes)
    assert batches[0].inputs["input_ids"].shape[1] == 12
    ungrouped = batches_of(encoded_of(sizes), 5, pad_to_multiple_of=1, group_by_length=False)
    assert sum(batch.inputs["input_ids"].numel() for batch in ungrouped.epoch(0)) > 1.3 * sum(sizes)


def test_the_last_batch_is_kept_unless_asked() -> None:
    encoded = encoded_of([4] * 10)
    assert [len(batch) for batch in seen(batches_of(encoded, 4), 0)] == [4, 4, 2]
    assert [len(batch) for batch in seen(batches_of(encoded, 4, drop_last=True), 0)] == [4, 4]
    in_order = batches_of(encoded, 4, shuffle=False, group_by_length=False)
    assert seen(in_order, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_padding_is_masked_and_never_wider_than_max_length() -> None:
    (batch,) = batches_of(encoded_of([3, 9]), shuffle=False).epoch(0)
    assert batch.inputs["input_ids"].shape == (2, 16)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [9, 3]
    assert batch.inputs["labels"][1].tolist() == [MASKED, 3, 3] + [MASKED] * 13
    assert batch.inputs["input_ids"][1, 3:].eq(0).all()
    (wide,) = batches_of(encoded_of([3, 9]), shuffle=False, pad_to_multiple_of=10).epoch(0)
    assert wide.inputs["input_ids"].shape == (2, 10)
    (limited,) = batches_of(encoded_of([12]), shuffle=False, pad_to_multiple_of=100).epoch(0)
    assert limited.inputs["input_ids"].shape == (1, 16)


def test_packed_rows_hold_whole_examples() -> None:
    batches = batches_of(encoded_of([10, 6, 9, 7, 12], packing=True), 2)
    assert len(batches) == 2
    for batch in batches.epoch(0):
        assert batch.inputs["input_ids"].shape[1] <= 16
        tokens = batch.inputs["input_ids"]
        for i in batch.indices:
            assert int((tokens == 3 + i).sum()) == int(batches.encoded.lengths[i])
        assert [i for row in batch.rows for i in row] == batch.indices
        for row, examples in zip(tokens, batch.rows, strict=True):
            assert {int(t) - 3 for t in row if t >= 3} == set(examples)
    batches.layout = "flat"
    for batch in batches.epoch(0):
        assert (len(batch.inputs["input_ids"]), batch.rows) == (1, [batch.indices])


def test_a_state_belongs_to_its_batches() -> None:
    batches = batches_of(encoded_of([4] * 10))
    state = batches.state(3, 2)
    assert batches_of(encoded_of([4] * 10)).resume(state) == (3, 2)
    with pytest.raises(DataError, match="seed was 1, is 2"):
        batches_of(encoded_of([4] * 10), seed=2).resume(state)
    with pytest.raises(DataError, match="examples was 10, is 11; lengths was"):
        batches_of(encoded_of([4] * 11)).resume(state)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 0.95))
def test_sets_have_their_shares_and_show_all_rows_in_turn(first: int, second: int, share: float) -> None:
    member = np.repeat([0, 1], [first, second])
    encoded = encoded_of([4] * (first + second), mixture=Mixture((share, 1 - share), member))
    orders = [encoded.order(5, epoch) for epoch in range(12)]
    for order in orders:
        assert int((member[order] == 0).sum()) == round(share * (first + second))
    assert [order.tolist() for order in orders] == [encoded.order(5, epoch).tolist() for epoch in range(12)]
    counts = np.bincount(np.concatenate(orders), minlength=first + second)
    for number in (0, 1):
        of_set = counts[member == number]
        assert of_set.max() - of_set.min() <= 1  # no row twice before every row once


def test_labels_of_each_task() -> None:
    def tensors(task: str, *rows: dict[str, Any]) -> Any:
        return collate(rows, task, 0, 4, 100)

    classes = tensors("sequence-classification", {"input_ids": [1], "labels": 2}, {"input_ids": [1, 2], "labels": 0})
    assert classes["labels"].tolist() == [2, 0]
    assert classes["labels"].dtype == torch.long
    several = tensors("sequence-classification", {"input_ids": [1], "labels": [1.0, 0.0]})
    assert several["labels"].tolist() == [[1.0, 0.0]]
    assert several["labels"].dtype == torch.float
    numbers = tensors("regression", {"input_ids": [1], "labels": 2.5})
    assert numbers["labels"].tolist() == [2.5]
    assert numbers["labels"].dtype == torch.float
    spans = tensors("question-answering", {"input_ids": [1, 2], "start_positions": 0, "end_positions": 1})
    assert spans["end_positions"].tolist() == [1]
    types = tensors("sequence-classification", {"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": 0})
    assert types["token_type_ids"].tolist() == [[0, 1, 0, 0]]
    targets = tensors("seq2seq", {"input_ids": [1] * 5, "labels": [1, 2]}, {"input_ids": [1], "labels": [1]})
    assert targets["input_ids"].shape == (2, 8)
    assert targets["labels"].shape == (2, 4)
    assert "labels" not in tensors("causal-lm", {"input_ids": [1]})


def test_targets_are_what_the_loss_counts() -> None:
    labels = torch.tensor([[5, 6, MASKED], [MASKED, 7, 8]])
    assert count_targets({"labels": labels}, "causal-lm", 2) == 3  # nothing predicts the first token
    assert count_targets({"labels": labels}, "token-classification", 2) == 4
    assert count_targets({"labels": torch.tensor([1, 0])}, "sequence-classification", 2) == 2
    assert count_targets({"start_positions": torch.tensor([1, 0])}, "question-answering", 2) == 2
    assert count_targets({}, "causal-lm", 2) == 0


def test_prompts_are_padded_where_the_model_continues() -> None:
    left = pad_prompts([[1, 2, 3], [4]], 0, left=True)
    assert left["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_prompts([[1, 2], [4]], 9, left=False)["input_ids"].tolist() == [[1, 2], [4, 9]]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(DataError, match="batch_size is 0"):
        batches_of(encoded_of([4]), 0)
    with pytest.raises(DataError, match="packing puts texts for causal-lm together"):
        batches_of(encoded_of([4], packing=True), task="sequence-classification")
