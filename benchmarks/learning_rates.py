"""The learning rates of `inlay/train/defaults.py`: each method at a few rates on two data sets.

    python benchmarks/learning_rates.py --data demo --data FOLDER_OF_MR [--methods bottleneck,mam] [--factors 1,3,10]

For each method the default rate times the factors, one seed, short runs, accuracy on the held-out rows after the last
step. The same call again goes on where it stopped; more methods, factors and data may be added. A rate is to be chosen
that is best, or near the best, on both. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from inlay.cli.demo import MODEL
from inlay.compare import Plan, Variant, compare
from inlay.compare.plan import template_of, variants_of
from inlay.train.defaults import defaults


def variants(methods: str, factors: list[float]) -> tuple[Variant, ...]:
    """Each method at each rate, the rate rounded to two digits."""
    found = []
    for variant in variants_of(methods):
        for factor in factors:
            rate = float(f"{defaults(variant.key, 'sequence-classification').learning_rate * factor:.2g}")
            found.append(Variant(f"{variant.label} {rate:g}", variant.method, {"learning_rate": rate}))
    return tuple(found)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", action="append")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", default="")
    parser.add_argument("--factors", default="0.3,1,3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/learning-rates"))
    args = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    chosen = variants(args.methods, [float(factor) for factor in args.factors.split(",")])
    for data in args.data or ["demo"]:
        words = ["eval_steps=1000000", "max_length=128"]
        flags = {"model": args.model, "data": data, "max_steps": args.steps}
        name = Path(data).name
        plan = Plan(template_of(words, flags), chosen, (1,), args.output_dir / name, inference=False)
        columns[name] = {row.label: row.quality for row in compare(plan).rows if not row.error}
    print("| method and rate | " + " | ".join(columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for variant in chosen:
        values = (columns[name].get(variant.label) for name in columns)
        print(f"| {variant.label} | " + " | ".join("–" if v is None else f"{v:.3f}" for v in values) + " |")


if __name__ == "__main__":
    main()
