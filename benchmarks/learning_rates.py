"""The learning rates of `src/inlay/train/defaults.py`: every method at a few rates, on two data sets for each kind.

    python benchmarks/learning_rates.py --minutes 8     # goes on where it stopped
    python benchmarks/learning_rates.py --table         # writes benchmarks/learning-rates-<date of the newest cell>.md

Understanding: film reviews and 77 intents with MiniLM; generation: restaurant descriptions and one-sentence summaries of
papers with a Llama of 0.7 million parameters. Tasks are those of `benchmarks/methods.py`, with `SHORTER` runs: one to
two minutes a cell on one core. A rate is chosen that is best, or near the best, on both sets. `--only`
takes tasks, methods, or cells written task:method:rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inlay.train.defaults import defaults
from methods import HERE, METHODS, Task, measure, tasks

Cell = tuple[str, str, float]

UNDERSTANDING: dict[str, tuple[float, ...]] = {
    "full": (3e-5, 1e-4, 3e-4),
    "lora": (7e-4, 2e-3, 5e-3),
    "bitfit": (7e-4, 2e-3, 7e-3),
    "bottleneck": (1e-3, 3e-3, 1e-2),
    "ia3": (2e-3, 5e-3, 2e-2, 5e-2),
    "adalora": (7e-4, 2e-3, 5e-3, 1e-2),
    "unipelt": (3e-4, 1e-3, 3e-3, 7e-3),
    "mam": (1e-4, 2e-4, 3e-4, 1e-3),
    "multihead": (2e-3, 5e-3, 2e-2),
    "prefix": (5e-3, 2e-2, 4e-2, 6e-2),
    "ptuningv2": (7e-3, 2e-2, 6e-2),
    "ptuning": (3e-4, 1e-3, 3e-3),
    "prompt": (3e-3, 1e-2, 3e-2),
    "scaled_parallel": (1e-4, 3e-4, 1e-3),
    "dora": (7e-4, 2e-3, 5e-3),
    "inlay": (1e-3, 3e-3, 1e-2),
    "headonly": (2e-2, 5e-2, 1e-1),
    "diffpruning": (3e-5, 1e-4, 3e-4),
}
GENERATION: dict[str, tuple[float, ...]] = {
    "lora": (5e-4, 2e-3, 5e-3),
    "dora": (5e-4, 2e-3, 5e-3),
    "adalora": (1e-3, 3e-3, 1e-2),
    "ia3": (3e-3, 1e-2, 3e-2),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "bottleneck": (2e-4, 2e-3, 7e-3),
    "inlay": (2e-4, 2e-3, 7e-3),
    "multihead": (2e-3, 7e-3, 2e-2),
    "mam": (2e-4, 7e-4, 2e-3),
    "unipelt": (5e-4, 2e-3, 5e-3),
    "prefix": (2e-3, 2e-2, 6e-2),
    "ptuningv2": (5e-3, 2e-2, 6e-2),
    "prompt": (1e-2, 3e-2, 1e-1),
    "ptuning": (1e-3, 3e-3, 1e-2),
    "full": (5e-5, 5e-4, 2e-3),
}
GRID = {"mr": UNDERSTANDING, "banking": UNDERSTANDING, "e2e": GENERATION, "tldr": GENERATION}


SHORTER: dict[str, dict[str, Any]] = {
    "mr": {"max_steps": 80, "per_device_train_batch_size": 16, "max_length": 32},
    "banking": {"max_steps": 120, "per_device_train_batch_size": 16, "max_length": 32},
    "e2e": {"max_steps": 200},
    "tldr": {"max_steps": 150},
}
"""One pass over 1,280 reviews, and over a fifth of the questions; 320 held-out rows of each."""


def shorter(name: str, task: Task) -> Task:
    """The task with its short runs."""
    keys = task.keys | SHORTER[name]
    if name == "mr":
        keys["data"] = f"{keys['data'].rpartition('#')[0]}#1600"  # of which a fifth is held out
    elif name == "banking":
        keys["eval_data"] = f"{keys['eval_data'].rpartition('#')[0]}#320"
    return dataclasses.replace(task, keys=keys)


def summaries(shared: Path, out: Path) -> Task:
    """A paper's first lines, then what it says in one sentence."""
    for side in ("train", "dev"):
        path = out / f"tldr-{side}.jsonl"
        if path.exists():
            continue
        with path.open("w", encoding="utf-8") as file:
            for line in (shared / "data" / "scitldr" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines():
                paper = json.loads(line)
                text = " ".join(paper["source"])[:320].rsplit(" ", 1)[0]
                row = {"prompt": f"{text}\nIn short:", "completion": f" {paper['target'][0]}"}
                file.write(json.dumps(row) + "\n")
    keys = {
        "model": str(shared / "data" / "weights_tinystories_656k" / "bf16"), "data": str(out / "tldr-train.jsonl"),
        "task": "causal-lm", "max_steps": 300, "eval_data": f"{out / 'tldr-dev.jsonl'}#200", "max_length": 256,
        "dtype": "float32", "bf16": False, "generation_metrics": False,
    }  # fmt: skip
    return Task("Llama, 656 K", keys, "loss", lower_is_better=True, floor="untouched")


def cells() -> Iterator[Cell]:
    """(task, method, rate) of everything that is to be measured."""
    for grid in (UNDERSTANDING, GENERATION):
        for method, rates in grid.items():
            for rate in rates:
                yield from ((task, method, rate) for task in GRID if GRID[task] is grid)


def known(out: Path) -> dict[Cell, dict[str, Any]]:
    """The cells measured so far."""
    path = out / "cells.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["task"], row["method"].partition(" ")[0], row["learning_rate"]): row for row in rows}


def table(chosen: dict[str, Task], done: dict[Cell, dict[str, Any]]) -> list[str]:
    """The page, without its notes."""
    any_row = next(iter(done.values()))
    lines = [
        f"# Learning rates, {max(row['date'] for row in done.values())}",
        "",
        "Written by `python benchmarks/learning_rates.py`; torch "
        f"{any_row['torch'].split('+')[0]}, transformers {any_row['transformers']}. One seed. Held-out score, and the "
        "held-out loss in brackets; **bold** is the best rate of a method on a set, and → the default.",
    ]
    for names, kind in ((("mr", "banking"), UNDERSTANDING), (("e2e", "tldr"), GENERATION)):
        heads = [f"{name} ({chosen[name].base}, {chosen[name].keys['max_steps']} steps)" for name in names]
        lines += ["", f"| method | rate | {' | '.join(heads)} |", "|---|---|" + "---|" * len(names)]
        for method in kind:
            rates = sorted({rate for task, m, rate in done if m == method and task in names})
            default = defaults(METHODS[method], _task(names[0])).learning_rate
            best = {name: _best(done, name, method, chosen[name]) for name in names}
            for rate in rates:
                shown = [_shown(done.get((n, method, rate)), chosen[n], best[n]) for n in names]
                mark = "→ " if rate == default and method != "headonly" else ""
                lines.append(f"| {method} | {mark}{rate:g} | {' | '.join(shown)} |")
    return lines


def _task(name: str) -> str:
    return "causal-lm" if GRID[name] is GENERATION else "sequence-classification"


def _best(done: dict[Cell, dict[str, Any]], name: str, method: str, task: Task) -> float:
    scores = [row["held_out"][task.score] for (t, m, _), row in done.items() if (t, m) == (name, method)]
    return (min if task.lower_is_better else max)(scores, default=0.0)


def _shown(row: dict[str, Any] | None, task: Task, best: float) -> str:
    if row is None:
        return ""
    score = row["held_out"][task.score]
    text = f"**{score:.3f}**" if score == best else f"{score:.3f}"
    return text if task.score == "loss" else f"{text} ({row['held_out']['loss']:.3f})"


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("INLAY_SHARED", HERE.parents[1] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(default), help="the folder of test data")
    parser.add_argument("--out", type=Path, default=Path("runs/rates"), help="where runs and results are kept")
    parser.add_argument("--methods-out", type=Path, default=Path("runs/methods"), help="the same of methods.py")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no new cell after this time")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--table", action="store_true", help="write the table of what is finished, and train nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    shared, began = arguments.shared.resolve(), time.monotonic()
    every = tasks(shared, arguments.methods_out.resolve()) | {"tldr": summaries(shared, out)}
    chosen = {name: shorter(name, every[name]) for name in GRID}
    done, only = known(out), set(arguments.only)
    wanted = [cell for cell in cells() if not only or only & {cell[0], cell[1], "{}:{}:{:g}".format(*cell)}]
    for name, method, rate in [] if arguments.table else wanted:
        if (name, method, rate) in done or time.monotonic() - began > 60 * arguments.minutes:
            continue
        task = dataclasses.replace(chosen[name], keys=chosen[name].keys | {"learning_rate": rate})
        row = done[name, method, rate] = measure(name, task, method, out)
        with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:8} {method:15} {rate:<8g} {row['held_out'][task.score]:.3f}", flush=True)
    left = sum(cell not in done for cell in wanted)
    print(f"{len(wanted) - left} of {len(wanted)} cells are done")
    if done:
        path = HERE / f"learning-rates-{max(row['date'] for row in done.values())}.md"
        mark = "\n## Notes\n"
        notes = path.read_text(encoding="utf-8").partition(mark)[2] if path.exists() else ""
        page = "\n".join(table(chosen, done)) + "\n" + (mark + notes if notes else "")
        path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
