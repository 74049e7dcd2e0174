"""kill -9 at random moments of real runs: the run that is left goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from children import wait
from inlay.train import checkpoint
from tiny import tiny
from torture.forks import World, contents, moment, remove
from train.worlds import data_file, tokenizer

pytestmark = pytest.mark.torture

KILLS, PIECES = 100, 10
METHODS = [
    {"name": "lora", "rank": 4, "dropout": 0.1},
    {"name": "adalora", "target_rank": 2, "init_rank": 4},
    {"name": "prefix", "length": 3, "mid": 8},
    "dora",
    "bottleneck",
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny BERT with dropout, and labelled rows."""
    folder = tmp_path_factory.mktemp("kills")
    tiny("bert", dropout=0.1).save_pretrained(folder / "bert")
    tokenizer("bert").save_pretrained(folder / "bert")
    data_file(folder / "labelled.jsonl", "labelled")
    return folder


@pytest.mark.parametrize("piece", range(PIECES))
def test_random_kills(base, tmp_path, piece):
    settings = {
        "model": str(base / "bert"), "data": str(base / "labelled.jsonl"), "method": METHODS[piece % len(METHODS)],
        "max_steps": 30, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "eval_steps": 5,
        "save_steps": 3, "logging_steps": 2, "baseline": False, "bf16": False, "seed": piece,
    }  # fmt: skip
    world = World(tmp_path, settings)
    straight, seconds = world.whole("straight")
    expected = contents(straight)
    choose, kills, moments, started = random.Random(piece), 0, [], False
    run = tmp_path / "killed"
    while kills < KILLS // PIECES or started:
        child = world.start(run)
        started = True
        if kills < KILLS // PIECES:
            time.sleep(moment(choose, seconds))
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), world.log.read_text()
        found, skipped = checkpoint.newest(run)
        assert skipped == [], "a kill left a damaged checkpoint"
        if code == 0:
            assert contents(run) == expected
            remove(run)
            started = False
        else:
            kills += 1
            moments.append(found.name if found else "none")
    assert len(set(moments)) > 2, f"all kills hit the same place: {moments}"
    print(f"{kills} kills, newest checkpoints after them: {', '.join(moments)}")
