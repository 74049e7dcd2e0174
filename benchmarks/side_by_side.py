"""Whether runs that share each pass over the base take less time than the same runs one after another.

    python benchmarks/side_by_side.py [--rows 4] [--words 12] [--steps 12] [--methods lora,ia3,...]

MiniLM, random words of two classes, `rows` rows of `words` words a step for each method. Prints seconds a step: the sum
over the methods alone, and together; loading, tokenizing and evaluation are left out. The first two steps do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from inlay.cli.demo import MODEL
from inlay.compare.cell import steps_of
from inlay.config import RunConfig
from inlay.sweep.run import Job, make_some
from inlay.sweep.space import Point
from inlay.train.narrate import Narrator
from inlay.train.report import read_log

METHODS = "lora,ia3,bitfit,bottleneck,prefix,headonly"
VOCABULARY = [
    "river",
    "stone",
    "light",
    "paper",
    "cloud",
    "winter",
    "garden",
    "silver",
    "window",
    "music",
    "paint",
    "horse",
    "table",
    "bread",
    "letter",
]


def write_rows(path: Path, count: int, words: int) -> None:
    choose = random.Random(0)
    rows = ({"text": " ".join(choose.choices(VOCABULARY, k=words)), "label": f"c{i % 2}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def seconds(folder: Path, methods: list[str], args: argparse.Namespace, most: int) -> float:
    """Seconds of one step of all methods."""
    jobs = []
    for method in methods:
        config = RunConfig(
            model=MODEL, data=str(folder / "rows.jsonl"), method=method, output_dir=str(folder / f"{method}-{most}"),
            per_device_train_batch_size=args.rows, max_steps=args.steps, logging_steps=1, eval_fraction=0.0,
            baseline=False, bf16=not args.fp32, save_steps=10**9,
        )  # fmt: skip
        jobs.append(Job(Point(()), config))
    narrator, todo = Narrator(Console(quiet=True), quiet=True), list(jobs)
    while todo:
        done = make_some(todo, most, narrator)
        todo = [job for job in todo if job not in done]
    return sum(statistics.median(steps_of(read_log(job.folder))[2:]) for job in jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--fp32", action="store_true")
    args = parser.parse_args()
    methods = args.methods.split(",")
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name) / "rows.jsonl", args.rows * args.steps, args.words)
        alone, together = (seconds(Path(name), methods, args, most) for most in (1, len(methods)))
    print(
        f"{len(methods)} methods, {args.rows} rows of {args.words} words, {'fp32' if args.fp32 else 'bf16'}: "
        f"alone {1000 * alone:.0f} ms, together {1000 * together:.0f} ms, {together / alone:.2f}"
    )


if __name__ == "__main__":
    main()
