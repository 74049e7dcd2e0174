"""inlay beside PEFT, full fine-tuning, the frozen model, and the limit of the machine: `make bench`.

    python benchmarks/run.py                  # all cells (about 20 minutes), then the report
    python benchmarks/run.py --quick          # a few cells, two minutes
    python benchmarks/run.py --minutes 3      # goes on where it stopped; again until it says that all is done

Each cell runs in a fresh process and measures all variants in turn: same model, data, seed, dtype, targets, rank and
optimizer (`variants.py`). Finished cells stand in `<out>/cells.jsonl`, one line each, with a digest of the code that was
measured: cells of other code are measured again. The report, `benchmarks/<date>-<machine>.md` with a plot, is written from what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import KEEP_PAGES, machine
from variants import METHODS, NAMES

HERE = Path(__file__).resolve().parent
Cell = dict[str, Any]


def cells(quick: bool) -> list[Cell]:
    """Everything to measure, the most telling first."""

    def steps(method: str, size: str, dtype: str, repeats: int, **more: Any) -> Cell:
        return {"script": "steps.py", "method": method, "size": size, "dtype": dtype, "repeats": repeats, **more}

    def moments(what: str, repeats: int) -> Cell:
        return {"script": "moments.py", "what": what, "repeats": repeats}

    if quick:
        found = [steps("lora", "small", dtype, 5) for dtype in ("float32", "bfloat16")]
        found += [steps(method, "small", "float32", 5) for method in ("qlora", "dora", "adalora", "ia3", "prefix")]
        return [*found, moments("handling", 1), moments("one row", 20)]
    both = (("float32", 5), ("bfloat16", 7 if has_bf16() else 1))  # dtypes, and repeats at the large size
    most = both if has_bf16() else both[:1]
    found = [steps("lora", "large", dtype, repeats) for dtype, repeats in both]
    found += [
        steps("lora", size, dtype, 25 if repeats > 1 else 5) for size in ("tiny", "small") for dtype, repeats in both
    ]
    found += [moments("handling", 5), moments("one row", 100), moments("imports", 2)]
    others = [m for m in METHODS if m not in ("lora", "qlora")]
    found += [steps(method, "large", "bfloat16", 5) for method in others if most == both]
    found += [steps("qlora", "large", dtype, repeats) for dtype, repeats in both]
    found += [steps("lora", "large", dtype, repeats, dropout=0.05) for dtype, repeats in most]
    found += [steps(method, "small", "float32", 9) for method in (*others, "qlora")]
    found += [steps("dora", "large", "float32", 3)]
    for method in ("lora", "qlora"):
        found += [steps(method, "large", dtype, 5, pages="kept") for dtype, _ in most]
    for dtype, _ in most:
        found += [steps("lora", "large", dtype, 3, only=name) for name in NAMES]
    return found


def has_bf16() -> bool:
    """Whether this processor multiplies bf16; where it does not, a step of most variants takes half a minute."""
    import torch

    from inlay.kernels.gemm import has_instructions

    return has_instructions(torch.bfloat16)


def measure(cell: Cell, threads: int) -> dict[str, Any]:
    """The result of one cell, from a process of its own."""
    spec = {key: value for key, value in cell.items() if key != "script"} | {"threads": threads}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    if cell.get("pages") == "kept":
        environment |= KEEP_PAGES
    command = [sys.executable, str(HERE / cell["script"]), json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{cell} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


MEASURED = ("kernels", "hosts", "methods", "quant", "anatomy", "formats")
"""Folders of inlay that a cell runs through, with the files beside them; not training, planning, the command line."""


def code() -> str:
    """A digest of what is measured and of what measures it."""
    spec = importlib.util.find_spec("inlay")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    files = [
        *root.glob("*.py"),
        *(f for name in MEASURED for f in (root / name).rglob("*") if f.suffix in (".py", ".c")),
    ]
    files += [HERE / name for name in ("steps.py", "variants.py", "limit.py", "moments.py", "measure.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def read(path: Path, digest: str) -> list[dict[str, Any]]:
    """The finished cells of this code."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line.get("code") == digest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells only; the report is printed, not written")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further cell after this long")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1: no barriers on a shared machine)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "bench", help="folder of finished cells")
    parser.add_argument("--name", help="how the machine is called in the report's file name")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="cells with all these words, such as lora bfloat16"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report of what is there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("quick.jsonl" if options.quick else "cells.jsonl")
    if options.quick:
        path.unlink(missing_ok=True)
    wanted, start, digest = cells(options.quick), time.monotonic(), code()
    for number, cell in enumerate(wanted, 1):
        label = " ".join(str(v) for k, v in cell.items() if k not in ("script", "repeats"))
        if not set(options.only) <= set(label.split()):
            continue
        if options.report or any(line["cell"] == cell for line in read(path, digest)):
            continue
        if time.monotonic() - start > 60 * options.minutes:
            break
        begun = time.monotonic()
        result = measure(cell, options.threads)
        with path.open("a") as file:
            file.write(json.dumps({"cell": cell, "code": digest, "machine": machine(), **result}) + "\n")
        print(f"{number:3}/{len(wanted)}  {label:40} {time.monotonic() - begun:5.1f} s", flush=True)
    from report import text, write

    done = read(path, digest)
    missing = [cell for cell in wanted if not any(line["cell"] == cell for line in done)]
    if options.quick:
        print(text(done, missing, None))
        return
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells; wrote {write(done, missing, HERE, options.name)}")
    if missing:
        print("run it again for the rest")


if __name__ == "__main__":
    main()
