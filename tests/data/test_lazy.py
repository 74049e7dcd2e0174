"""Data larger than memory: what is kept of a row until it is needed is a few bytes."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from children import fork, wait
from inlay.data import Batches, DataSpec, prepare

ROWS, TEXT = 2_400, 20_000
FILE, ALLOWED = ROWS * TEXT, 24 * 2**20


def data_memory() -> int:
    """Bytes of memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024


def test_a_file_larger_than_memory_streams(tmp_path: Path, bytes_tok: PreTrainedTokenizerBase) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    row = {"prompt": "a long text " * (TEXT // 12), "completion": "its end"}
    small.write_text(json.dumps(row) + "\n")
    with large.open("w") as file:
        for number in range(ROWS):
            file.write(json.dumps(row | {"completion": f"end {number}"}) + "\n")
    assert large.stat().st_size > FILE > 1.9 * ALLOWED

    def read(path: Path, batches: int) -> list[Any]:
        spec = DataSpec(
            str(path), eval_fraction=0.0, streaming=True, cache_dir=str(tmp_path / "cache"), max_length=16_000
        )
        prepared = prepare(spec, bytes_tok, "decoder")
        made = Batches(prepared.train, 4, seed=1, shuffle=True, pad_token_id=0, task=prepared.task)
        return [made.batch(0, index).targets for index in range(batches)]

    def act() -> None:
        read(small, 1)  # everything is imported
        limit = data_memory() + ALLOWED
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with pytest.raises(MemoryError):
            large.read_bytes()  # the limit holds
        assert len(read(large, 20)) == 20

    assert wait(fork(act, tmp_path / "output.log")) == 0, (tmp_path / "output.log").read_text()[-3000:]
