"""kill -9 at random moments of real runs: the run that is left goes on to the same bits."""

from __future__ import annotations

import random
import signal

import pytest

from children import wait
from inlay.train import checkpoint
from tiny import tiny
from torture.forks import World, contents, remove
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


FAMILIES = [("bert", "labelled"), ("llama", "prompted")]  # the second writes samples too


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny BERT and a tiny Llama with dropout, and rows for both."""
    folder = tmp_path_factory.mktemp("kills")
    for family, kind in FAMILIES:
        tiny(family, dropout=0.1).save_pretrained(folder / family)
        tokenizer(family).save_pretrained(folder / family)
        data_file(folder / f"{kind}.jsonl", kind)
    return folder


@pytest.mark.parametrize("piece", range(PIECES))
def test_random_kills(base, tmp_path, piece):
    family, kind = FAMILIES[piece // len(METHODS)]
    settings = {
        "model": str(base / family), "data": str(base / f"{kind}.jsonl"), "method": METHODS[piece % len(METHODS)],
        "max_steps": 30, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "eval_steps": 5,
        "save_steps": 3, "logging_steps": 2, "baseline": False, "bf16": False, "seed": piece,
        "eval_samples": 2, "generation_max_new_tokens": 3, "generation_eval_rows": 2,
    }  # fmt: skip
    world = World(tmp_path, settings)
    straight, events = world.whole("straight")
    expected = contents(straight)
    choose, kills, moments, started = random.Random(piece), 0, [], False
    run = tmp_path / "killed"
    while kills < KILLS // PIECES or started:
        kind = choose.choice(["file", "pass"])
        code = wait(world.start(run, kind, choose.randint(1, events[kind]) if kills < KILLS // PIECES else 0))
        started = True
        assert code in (0, -signal.SIGKILL), world.log.read_text()
        found, skipped = checkpoint.newest(run)
        assert skipped == [], "a kill left a damaged checkpoint"
        if code == 0:
            assert contents(run) == expected
            remove(run)
            started = False
        else:
            kills += 1
            moments.append(f"{kind} after {found.name if found else 'none'}")
    assert len(set(moments)) > 2, f"all kills hit the same place: {moments}"
    print(f"{kills} kills: {', '.join(moments)}")
