"""Several processes make the steps that one makes: equal weights, equal log, one checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from train.engine import Rows, loop

SETTINGS = {"dropout": 0.0, "save_steps": 2, "num_train_epochs": 2.0, "optim": "sgd", "save_total_limit": 9}
WORKER = f"""
import sys
from pathlib import Path
from train.engine import loop, Rows
loop(Path(sys.argv[1]), rows=Rows(20, 3), **{SETTINGS}).fit()
"""


def start(folder: Path, processes: int) -> None:
    """Train in so many processes of this machine."""
    tests = Path(__file__).resolve().parents[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(tests), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", WORKER, str(folder)]
    children = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(processes)
    ]
    for child in children:
        _, errors = child.communicate(timeout=150)
        assert child.returncode == 0, errors


def numbers(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "split")} for line in lines]


def test_two_processes_equal_one_that_accumulates(tmp_path):
    """7 batches an epoch: at its end one process has none of its own."""
    start(tmp_path / "two", 2)
    loop(tmp_path / "one", rows=Rows(20, 3), gradient_accumulation_steps=2, **SETTINGS).fit()
    ours, theirs = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert len(ours) == len(theirs) == 8
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    for step in (2, 8):
        weights = [load_file(tmp_path / n / f"checkpoint-{step}" / "adapter.safetensors") for n in ("two", "one")]
        for name, tensor in weights[1].items():
            assert (weights[0][name] - tensor).abs().max() < 1e-5
