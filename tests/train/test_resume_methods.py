"""Every method, stopped in every kind of place and gone on with, ends with the bits of a run in one go."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inlay.config_loading import load, method_names
from inlay.train import checkpoint, report, runfolder
from inlay.train.evaluate import Evaluator
from inlay.train.loop import Loop
from inlay.train.run import train
from tiny import tiny
from train.worlds import data_file, tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "dropout": 0.1},
    "dora": {"rank": 2, "dropout": 0.1},
    "adalora": {"target_rank": 1, "init_rank": 3, "interval": 1, "dropout": 0.1},
    "ia3": {},
    "bitfit": {},
    "bottleneck": {},
    "prefix": {"length": 3, "mid": 8, "dropout": 0.1},
    "prompt": {"length": 3},
    "ptuning": {"template": "{prompt:3} {text}", "hidden": 8, "dropout": 0.1},
    "ptuningv2": {"length": 3, "mid": 8},
    "mam": {"length": 3, "mid": 8, "size": 8, "dropout": 0.1},
    "unipelt": {"length": 3, "mid": 8},
    "multihead": {"length": 3},
    "inlay": {"form": "low_rank", "size": 2, "sites": "ffn", "composition": "gated"},
    "diffpruning": {},
    "full": {},
    "headonly": {},
}
SETTINGS: dict[str, Any] = {
    "max_steps": 6, "eval_steps": 3, "save_steps": 1, "logging_steps": 2, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2, "baseline": False, "bf16": False,
}  # fmt: skip
"""54 rows to learn from are 7 batches: steps 4 and 8 end an epoch, and their groups are half as large."""


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    tiny("bert", dropout=0.1).save_pretrained(folder / "bert")  # the base draws random numbers
    tokenizer("bert").save_pretrained(folder / "bert")
    data_file(folder / "labelled.jsonl", "labelled")
    return folder


@pytest.fixture(autouse=True)
def quick(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says nothing here and takes time is left out."""
    monkeypatch.setenv("INLAY_CACHE", str(world / "cache"))
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr(runfolder, "environment", lambda: dict.fromkeys(("inlay", "torch", "python"), ""))


def in_evaluation(patch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM while the held-out rows of a step are measured."""
    real = Evaluator.__call__

    def measured(self: Evaluator, now: int) -> Any:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, now)

    patch.setattr(Evaluator, "__call__", measured)


def in_accumulation(patch: pytest.MonkeyPatch, step: int) -> None:
    """A kill after the first of the batches of a step."""
    real = Loop._backward

    def backward(self: Loop, batch: Any, weight: float) -> Any:
        if self.state.step + 1 == step and any(p.grad is not None for p in self.parameters):
            raise Killed
        return real(self, batch, weight)

    patch.setattr(Loop, "_backward", backward)


def in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """SIGINT in the forward passes of a step."""
    real = Loop._step

    def stepping(self: Loop, group: Any) -> Any:
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, group)

    patch.setattr(Loop, "_step", stepping)


Stop = Callable[[pytest.MonkeyPatch, int], None]
STOPS: list[tuple[Stop, int, int]] = [  # how, at which step, and which checkpoint is then the newest
    (in_evaluation, 0, 0),  # before the first step
    (in_accumulation, 1, 0),
    (in_evaluation, 3, 3),
    (in_step, 4, 4),  # at the edge of an epoch
    (in_accumulation, 6, 5),
]


def tensors(run: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(run.rglob("*.safetensors")):
        yield path.relative_to(run).as_posix(), path.read_bytes()


def log(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_no_method_is_forgotten():
    helpers = {"base", "budget", "cell", "gated", "positions"}  # files of methods that are no method of that name
    assert method_names() - helpers <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_five_times_a_run_is_the_same_to_the_bit(world, tmp_path, method):
    settings = SETTINGS | {"model": str(world / "bert"), "data": str(world / "labelled.jsonl")}
    settings["method"] = {"name": method, **METHODS[method]}
    straight = train(load(None, [], settings | {"output_dir": str(tmp_path / "straight")}), quiet=True)
    run = tmp_path / "run"
    config = load(None, [], settings | {"output_dir": str(run)})
    for stop, step, kept in STOPS:
        with pytest.MonkeyPatch.context() as patch:
            stop(patch, step)
            with pytest.raises((checkpoint.Interrupted, Killed)):
                train(config, quiet=True)
        found, skipped = checkpoint.newest(run)
        assert (found, skipped) == (run / f"checkpoint-{kept}", []), (stop.__name__, step)
        config = load(run / "config.yaml", [], {"resume": str(run)})
    resumed = train(config, quiet=True)
    ours, theirs = dict(tensors(run)), dict(tensors(straight.run))
    assert ours.keys() == theirs.keys()
    assert {"adapter/adapter.safetensors", "best/adapter.safetensors", "checkpoint-6/optimizer.safetensors"} < set(ours)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert log(run) == log(straight.run)
    assert resumed.results == straight.results
