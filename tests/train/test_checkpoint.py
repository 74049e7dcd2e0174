"""A checkpoint appears whole or not at all, says itself when it is damaged, and no reader trusts a file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from children import killed_at
from inlay import folders
from inlay.errors import CheckpointError
from inlay.train import checkpoint
from inlay.train.checkpoint import RunState
from inlay.train.paged import make_adamw
from train.engine import HeadAdapter, Net


def make(value: float) -> tuple[HeadAdapter, torch.optim.Optimizer]:
    """An adapter full of one value, and an optimizer that has stepped."""
    model = Net()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.head.parameters():
        parameter.data.fill_(value)
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return HeadAdapter(model), optimizer


def save(run: Path, step: int, value: float, keep: int = 1) -> None:
    adapter, optimizer = make(value)
    checkpoint.write(
        run, RunState(step=step), adapter=adapter, optimizer=optimizer, extra={"schedule": {}}, identity={}, keep=keep
    )


def value_of(folder: Path) -> float:
    """What the adapter of a checkpoint is full of; everything else in it must fit."""
    adapter, optimizer = make(0.0)
    state, _ = checkpoint.restore(folder, adapter=adapter, optimizer=optimizer)
    assert folder.name.startswith(f"checkpoint-{state.step}")
    values = adapter.state_dict()["head.weight"].unique()
    assert len(values) == 1
    moment = optimizer.state_dict()["state"][0]["exp_avg"].unique()
    torch.testing.assert_close(moment, 0.1 * values)
    return float(values)


@pytest.mark.parametrize("replaces", [False, True], ids=["new step", "same step again"])
def test_killed_at_any_file_operation_the_old_or_the_new_one_is_whole(tmp_path, replaces):
    start = tmp_path / "start"
    save(start, 4 if replaces else 2, 1.0)
    seen, event = set(), 1
    while True:
        run = tmp_path / f"killed-{event}"
        shutil.copytree(start, run)
        died = killed_at(event, run, lambda run=run: save(run, 4, 2.0))
        found, skipped = checkpoint.newest(run)
        assert found is not None, f"nothing is left after a kill at operation {event}"
        assert skipped == []
        seen.add(value_of(found))
        save(run, 6, 3.0)  # and the next save is not in the way of what is lying about
        folders.clear_leftovers(run)
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-6"]
        shutil.rmtree(run)
        if not died:
            break
        event += 1
    assert event > 30, "the kills hit nothing"
    assert seen == {1.0, 2.0}


class Disk:
    """A disk that fails from the n-th write, rename or fsync on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken_from: int) -> None:
        self.operations, self.broken_from = 0, broken_from
        for name in ("fsync", "rename", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.operations += 1
            if self.operations >= self.broken_from:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return operation


@pytest.mark.parametrize("broken_from", range(1, 16))
def test_a_disk_that_fails_keeps_the_old_checkpoint(tmp_path, broken_from):
    save(tmp_path, 2, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, broken_from)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 4, 2.0)
        assert disk.operations >= broken_from
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None
    assert skipped == []
    assert value_of(found) in (1.0, 2.0)
    save(tmp_path, 6, 3.0)
    assert value_of(tmp_path / "checkpoint-6") == 3.0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flip": (flip, r"was altered|cannot be read|lists no files|bad entry|is missing|were written"),
    "truncation": (truncate, r"bytes, \d+ were written|cannot be read"),
    "missing": (Path.unlink, r"is missing"),
}
FILES = (
    "adapter.safetensors",
    "adapter/adapter.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "metrics.jsonl",
    "manifest.json",
)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, file, damage):
    (tmp_path / "metrics.jsonl").write_text('{"split": "train", "step": 1}\n')
    save(tmp_path, 2, 1.0, keep=2)
    save(tmp_path, 4, 2.0, keep=2)
    act, message = DAMAGE[damage]
    act(tmp_path / "checkpoint-4" / file)
    found, skipped = checkpoint.newest(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert len(skipped) == 1
    assert "checkpoint-4" in skipped[0]
    with pytest.raises(CheckpointError, match=message):
        folders.verify(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../x"])
def test_a_manifest_does_not_reach_out_of_its_folder(tmp_path, name):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {name: {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="bad entry"):
        folders.verify(tmp_path)


def test_a_link_is_not_followed(tmp_path):
    save(tmp_path, 2, 1.0)
    inside = tmp_path / "checkpoint-2" / "state.json"
    shutil.copy(inside, tmp_path / "elsewhere")
    inside.unlink()
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        folders.verify(tmp_path / "checkpoint-2")


@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=50).map(str.encode)))
@pytest.mark.parametrize("file", ["manifest.json", "state.json", "random.safetensors", "optimizer.safetensors"])
def test_readers_refuse_anything(tmp_path_factory, file, data):
    """Every reader by itself, without the hashes before it: an error of ours, never another."""
    run = tmp_path_factory.mktemp("fuzz")
    save(run, 2, 1.0)
    folder = run / "checkpoint-2"
    (folder / file).write_bytes(data)
    adapter, optimizer = make(0.0)
    read = folders.verify if file == "manifest.json" else checkpoint.restore
    arguments = {} if file == "manifest.json" else {"adapter": adapter, "optimizer": optimizer}
    with pytest.raises(CheckpointError):
        read(folder, **arguments)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8 + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        (50).to_bytes(8, "little") + b'{"cpu":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}        \x00',
    ],
)
def test_crafted_tensor_headers(tmp_path, header):
    save(tmp_path, 2, 1.0)
    (tmp_path / "checkpoint-2" / "random.safetensors").write_bytes(header)
    adapter, optimizer = make(0.0)
    with pytest.raises(CheckpointError):
        checkpoint.restore(tmp_path / "checkpoint-2", adapter=adapter, optimizer=optimizer)


def test_a_json_file_beyond_all_measure_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST_JSON_BYTES", 100)
    (tmp_path / "state.json").write_text(" " * 101)
    with pytest.raises(CheckpointError, match="101 bytes are more than any such file has"):
        folders.read_json(tmp_path / "state.json")


def test_deep_json_is_an_error_not_a_crash(tmp_path):
    (tmp_path / "state.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        folders.read_json(tmp_path / "state.json")


def test_random_generators_go_on_where_they_were():
    torch.manual_seed(1)
    random.seed(2)
    numpy.random.seed(3)
    torch.rand(5)
    random.gauss(0, 1)
    numpy.random.standard_normal(3)

    def draw() -> list[float]:
        return [*torch.rand(3).tolist(), random.gauss(0, 1), random.random(), *numpy.random.standard_normal(2)]

    tensors, plain = checkpoint.random_state()
    plain = json.loads(json.dumps(plain))
    expected = draw()
    draw()
    checkpoint.set_random_state(tensors, plain)
    assert draw() == expected


def test_pruning_keeps_the_newest(tmp_path):
    for step in (2, 10, 4, 6):
        save(tmp_path, step, 1.0, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4", "checkpoint-6"]


def test_a_state_of_another_version_is_refused(tmp_path):
    save(tmp_path, 2, 1.0)
    path = tmp_path / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        checkpoint.read_state(tmp_path / "checkpoint-2")
    state["run"]["extra"] = 1
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="has the fields"):
        checkpoint.read_state(tmp_path / "checkpoint-2")


def test_what_changed_is_shown():
    then, now = {"seed": 1, "base": "a 12", "method": {"rank": 8}}, {"seed": 1, "base": "a 34", "steps": 5}
    changes = checkpoint.differences(then, now)
    assert changes == [("base", "a 12", "a 34"), ("method", {"rank": 8}, None), ("steps", None, 5)]
    with pytest.raises(CheckpointError, match=r"base: 'a 12' in the checkpoint, 'a 34' now\n.*\n.*\n.*--allow-changed"):
        checkpoint.refuse_changes(changes, Path("run/checkpoint-2"))


class Odd(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"state": {0: {"thing": object()}}}


def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_lost():
    with pytest.raises(CheckpointError, match="Odd keeps a state that JSON cannot hold"):
        checkpoint.pack_optimizer(Odd(torch.nn.Linear(1, 1).parameters(), lr=0.1))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_every_optimizer_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Those of bitsandbytes keep dictionaries of tensors for a parameter of 4,096 values or more."""
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = parameter.detach().cos()
        optimizer.step()

    values = torch.nn.Parameter(torch.randn(80, 64))
    optimizer = make_adamw(name, [values], lr=0.1, weight_decay=0.0)
    step(values, optimizer)
    tensors, document = checkpoint.pack_optimizer(optimizer)
    checkpoint.save_tensors(tensors, tmp_path / "optimizer.safetensors")
    again = torch.nn.Parameter(values.detach().clone())
    fresh = make_adamw(name, [again], lr=0.5, weight_decay=0.0)
    document = json.loads(json.dumps(document))
    checkpoint.unpack_optimizer(fresh, checkpoint.read_tensors(tmp_path / "optimizer.safetensors"), document)
    step(values, optimizer)
    step(again, fresh)
    assert torch.equal(again, values)
