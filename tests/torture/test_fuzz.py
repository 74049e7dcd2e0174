"""Readers given damaged and crafted files: an error of ours or a sound result; no crash, no hang, no memory bomb."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from children import fork, wait
from inlay import folders
from inlay.errors import InlayError
from inlay.formats.native import _checksum
from inlay.train import checkpoint
from tiny import tiny
from torture.fault_worker import adapted, save_checkpoint

pytestmark = pytest.mark.torture

ROUNDS, SECONDS_EACH, MORE_MEMORY = 600, 20, 2 * 2**30
JUNK: list[Any] = [None, True, -1, 2**70, 1e308, "", "x" * 1000, [], {}, [[]], {"a": {"b": []}}, "../../etc", "\x00"]


def native(folder: Path) -> None:
    """An adapter folder of ours."""
    inlay.load(tiny("llama"), folder / "adapter")


def peft(folder: Path) -> None:
    """A PEFT folder."""
    inlay.load(tiny("llama"), folder / "peft")


def run(folder: Path) -> None:
    """A run folder's newest checkpoint: hashes, then everything in it."""
    found, _ = checkpoint.newest(folder / "run")
    if found is not None:
        adapter, optimizer = adapted(0.0)
        checkpoint.restore(found, adapter=adapter, optimizer=optimizer)


def inside(folder: Path) -> None:
    """The same without the hashes in front."""
    adapter, optimizer = adapted(0.0)
    checkpoint.restore(folder / "run" / "checkpoint-2", adapter=adapter, optimizer=optimizer)


READERS: dict[str, Callable[[Path], None]] = {"native": native, "peft": peft, "run": run, "inside": inside}


def damage(path: Path, choose: random.Random) -> None:
    """One way of being broken."""
    data = bytearray(path.read_bytes())
    match choose.randrange(7):
        case 0:
            data = bytearray(choose.randbytes(choose.randrange(500)))
        case 1:
            data = data[: choose.randrange(len(data))]
        case 2:
            for _ in range(choose.randrange(1, 9)):
                data[choose.randrange(len(data))] = choose.randrange(256)
        case 3:
            data += choose.randbytes(choose.randrange(1, 300))
        case 4 if path.suffix == ".json":
            data = bytearray(json.dumps(_junked(json.loads(data), choose)).encode())
        case 5 if path.suffix == ".json":
            bomb = [b'{"a":' * 200_000, b"[" * 500_000, b'{"a": ' + b"9" * 2_000_000 + b"}", b'"' + b"a" * 5_000_000]
            data = bytearray(choose.choice(bomb))
        case _ if path.suffix == ".safetensors":
            data = _crafted(data, choose)
    path.write_bytes(bytes(data))


def _junked(value: Any, choose: random.Random) -> Any:
    """A JSON value with one part of it replaced, removed or doubled."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(sorted(value))
        if choose.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if choose.random() < 0.1:
            return value | {f"{key}x": value[key]}
        return value | {key: _junked(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.7:
        at = choose.randrange(len(value))
        return [*value[:at], _junked(value[at], choose), *value[at + 1 :]]
    return choose.choice(JUNK)


def _crafted(data: bytearray, choose: random.Random) -> bytearray:
    """A safetensors file whose header lies."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return data
    name = choose.choice(sorted(k for k in header if k != "__metadata__"))
    lie = choose.choice(["shape", "data_offsets", "dtype"])
    lies: dict[str, list[Any]] = {
        "shape": [[2**40], [2**31, 2**31], [-1], [0], [], "x"],
        "data_offsets": [[0, 2**50], [8, 0], [-8, 8], [0, 0], [0]],
        "dtype": ["F64", "U8", "F4", "", 3, "BF16"],
    }
    header[name][lie] = choose.choice(lies[lie])
    text = json.dumps(header).encode()
    length = choose.choice([len(text), len(text), 2**63, 2**40, 0, len(text) + 7])
    return bytearray(length.to_bytes(8, "little")) + text + data[8 + size :]


def sign(folder: Path) -> None:
    """Make the hashes fit again, so that what stands behind them is read."""
    config_file, tensors_file = folder / "adapter" / "adapter.json", folder / "adapter" / "adapter.safetensors"
    try:
        config = json.loads(config_file.read_bytes())
        config["sha256"] = hashlib.sha256(tensors_file.read_bytes()).hexdigest()
        config["checksum"] = _checksum(config)
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    config_file.write_text(json.dumps(config))


@pytest.mark.parametrize("reader", READERS)
def test_fuzzed_readers(tmp_path, reader):
    good, read = tmp_path / "good", READERS[reader]
    good.mkdir()
    torch.manual_seed(0)
    adapted(1.0)[0].save(good / "adapter")
    adapted(1.0)[0].save(good / "peft", format="peft")
    save_checkpoint(good / "run", 2, 1.0)
    read(good)
    where = {"native": "adapter", "peft": "peft"}.get(reader, "run/checkpoint-2")
    files = sorted(p.relative_to(good) for p in (good / where).rglob("*") if p.suffix in (".json", ".safetensors"))
    report = tmp_path / "report.jsonl"

    def fuzz() -> None:
        limit = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MORE_MEMORY, limit[1]))
        outcomes: Counter[str] = Counter()
        for number in range(ROUNDS):
            choose = random.Random(f"{reader}-{number}")
            bad = tmp_path / "bad"
            shutil.copytree(good, bad)
            file = choose.choice(files)
            damage(bad / file, choose)
            if reader == "native" and choose.random() < 0.7:
                sign(bad)
            signal.alarm(SECONDS_EACH)
            try:
                read(bad)
                outcomes["read"] += 1
            except InlayError:
                outcomes["refused"] += 1
            except Exception as error:
                outcomes["another exception"] += 1
                with report.open("a") as log:
                    line = f"{reader} round {number}, {file}: {type(error).__name__}: {str(error)[:300]}"
                    log.write(json.dumps(line) + "\n")
            signal.alarm(0)
            folders.clear_leftovers(bad)
            shutil.rmtree(bad)
        (tmp_path / "counts.json").write_text(json.dumps(outcomes))

    code = wait(fork(fuzz, tmp_path / "output.log"))
    told = report.read_text() if report.exists() else ""
    assert code == 0, f"exit code {code}\n{(tmp_path / 'output.log').read_text()[-2000:]}\n{told[-2000:]}"
    print(f"{reader}: {(tmp_path / 'counts.json').read_text()} of {ROUNDS}")
    assert not told, told[:4000]
