"""Run with faults.c preloaded: `python fault_worker.py LIBRARY FOLDER ACT MODE`; prints a line of JSON with counts.

For every n: a child process does the act and meets the fault at its n-th file operation; then this process, in which
nothing fails, looks at what is left: the old or the new content, whole, and a way on from there.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import inlay
from children import fork, wait
from inlay import folders
from inlay.train import checkpoint
from inlay.train.checkpoint import RunState
from tiny import tiny

KILL, HALF, SPACE, PERMISSION, IO = range(5)


def adapted(value: float) -> tuple[Any, torch.optim.Optimizer]:
    """An adapter full of one value, and an optimizer that has stepped."""
    torch.manual_seed(0)
    adapter = inlay.attach(tiny("llama"), inlay.LoRA(rank=2))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in adapter.parameters():
        parameter.data.fill_(value)
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return adapter, optimizer


def save_checkpoint(run: Path, step: int, value: float) -> None:
    """A checkpoint with a log and a best adapter beside it, as the loop writes it."""
    adapter, optimizer = adapted(value)
    checkpoint.write(
        run, RunState(step=step), adapter=adapter, optimizer=optimizer, extra={"schedule": {}}, identity={}, keep=1
    )


def value_in(tensors: dict[str, torch.Tensor]) -> float:
    """The one value that fills all tensors."""
    values = torch.cat([tensor.flatten() for tensor in tensors.values()]).unique()
    assert len(values) == 1, "tensors of two states"
    return float(values)


def newest_checkpoint(run: Path) -> float:
    """What the newest complete checkpoint holds; it must restore as a whole."""
    found, skipped = checkpoint.newest(run)
    assert found is not None, "nothing is left"
    assert skipped == [], skipped
    adapter, optimizer = adapted(0.0)
    checkpoint.restore(found, adapter=adapter, optimizer=optimizer)
    value = value_in(adapter.state_dict())
    moment = value_in({str(i): s["exp_avg"] for i, s in optimizer.state_dict()["state"].items()})
    assert abs(moment - 0.1 * value) < 1e-6
    assert value_in(inlay.load(tiny("llama"), found / "adapter").state_dict()) == value
    return value


def adapter_folder(run: Path) -> float:
    """What the adapter folder holds, or the one that was being replaced."""
    return value_in(inlay.load(tiny("llama"), folders.recover(run / "adapter")).state_dict())


@dataclass(frozen=True)
class Act:
    """What is done before the fault, under it, and how the result is read."""

    before: Callable[[Path], Any]
    under: Callable[[Path], Any]
    read: Callable[[Path], float]
    after: Callable[[Path], Any]


def _with_log(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"split": "train", "step": 1}\n')
    adapted(1.0)[0].save(run / "best")
    save_checkpoint(run, 2, 1.0)


ACTS = {
    "next": Act(_with_log, lambda r: save_checkpoint(r, 4, 2.0), newest_checkpoint, lambda r: save_checkpoint(r, 6, 3)),
    "again": Act(
        _with_log, lambda r: save_checkpoint(r, 2, 2.0), newest_checkpoint, lambda r: save_checkpoint(r, 6, 3)
    ),
    "adapter": Act(
        lambda r: adapted(1.0)[0].save(r / "adapter"),
        lambda r: adapted(2.0)[0].save(r / "adapter"),
        adapter_folder,
        lambda r: adapted(3.0)[0].save(r / "adapter"),
    ),
}


def main(library: str, folder: Path, name: str, mode: int) -> None:
    """Every n until the act ends without meeting its fault."""
    faults = ctypes.CDLL(library)
    act, run, start = ACTS[name], folder / "run", folder / "start"
    start.mkdir(parents=True)
    act.before(start)
    seen: Counter[float] = Counter()
    n = 0
    while True:
        n += 1
        shutil.copytree(start, run)

        def under(n: int = n) -> None:
            faults.arm(os.fsencode(run), ctypes.c_long(n), mode)
            try:
                act.under(run)
            finally:
                reached = faults.count() >= n
                faults.arm(b"", ctypes.c_long(0), -1)
            if reached and mode in (SPACE, PERMISSION, IO):
                os._exit(3)  # it bore the fault: something that may fail, such as clearing up

        code = wait(fork(under, folder / "output.log"))
        assert code in (0, 1, 3, -9), (code, (folder / "output.log").read_text())
        value = act.read(run)
        assert value in (1.0, 2.0), value
        assert not (code in (0, 3) and value != 2.0), "a save that did not happen was reported as done"
        seen[value] += 1
        act.after(run)
        assert act.read(run) == 3.0, f"after fault {n} nothing can be saved any more"
        folders.clear_leftovers(run)
        left = sorted(p.name for p in run.iterdir())
        assert not [p for p in left if p.startswith(".") or p.endswith(".replaced")], left
        shutil.rmtree(run)
        if code == 0:
            break
    print(json.dumps({"act": name, "mode": mode, "faults": n - 1, "old": seen[1.0], "new": seen[2.0]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
