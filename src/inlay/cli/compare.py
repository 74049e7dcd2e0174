"""`inlay compare`: the same data, many methods, one report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from inlay.compare.plan import Plan

SETTINGS = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def verb(
    context: typer.Context,
    model: str = typer.Option(None, "--model", "-m", help="Folder or hub name of the pretrained model."),
    data: str = typer.Option(None, "--data", "-d", help="File, folder or hub name."),
    eval_data: str = typer.Option(None, "--eval-data", help="Held-out data; else a part of the data."),
    methods: str = typer.Option("", "--methods", help="lora,lora:rank=2,lora+prefix, ...; every method by default."),
    seeds: int = typer.Option(None, "--seeds", min=1, help="Runs of each; 3 by default, 2 in the demo."),
    sizes: str = typer.Option(None, "--sizes", help="Rows to train on, as 100,500,1000,all."),
    steps: int = typer.Option(None, "--steps", min=1, help="Optimizer steps of each run; else num_train_epochs=3."),
    output_dir: str = typer.Option(None, "--output-dir", "-o", help="The comparison's folder."),
    no_inference: bool = typer.Option(False, "--no-inference", help="Do not measure the time of inference."),
    side_by_side: bool = typer.Option(
        False, "--side-by-side/--one-by-one", help="Runs that can share it train in one pass over the base."
    ),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing."),
    json: bool = typer.Option(False, "--json", help="Print the rows as JSON at the end, and nothing else."),
) -> None:
    """Train many methods on the same data and write one report.

    inlay compare --model M --data D [--methods lora,adalora,prefix] [--seeds 3] [--sizes 100,1000,all] [key=value ...]

    Without --model and --data it compares every method on the demo's task. Any key of `inlay train --keys` may follow
    and holds for all runs; what is not given is each method's own default. The same call again goes on where it ended.
    """
    from dataclasses import replace
    from pathlib import Path

    from rich.console import Console

    from inlay.compare.demo import demo_plan
    from inlay.compare.plan import Plan, sizes_of, template_of, variants_of
    from inlay.errors import ConfigError

    if (model is None) != (data is None):
        raise ConfigError("compare: give both --model and --data, or neither for the demo's task")
    words = list(context.args)
    if model is None:
        plan = demo_plan(methods, seeds, sizes, steps, output_dir, words, inference=not no_inference)
    else:
        template = template_of(words, {"model": model, "data": data, "eval_data": eval_data, "max_steps": steps})
        folder = output_dir or f"runs/compare-{Path(model).name}-{Path(data).name}".lower()
        plan = Plan(
            template, variants_of(methods), tuple(range(1, 1 + (seeds or 3))), Path(folder),
            sizes=sizes_of(sizes or "all"), inference=not no_inference,
        )  # fmt: skip
    plan = replace(plan, together=side_by_side)
    show(plan, Console(), quiet=quiet or json, as_json=json)


def show(plan: Plan, console: Console, *, quiet: bool, as_json: bool) -> None:
    """Run a comparison and print its table."""
    from inlay.compare.compare import compare
    from inlay.compare.tell import as_rows, rich_table

    comparison = compare(plan, console=console, quiet=quiet)
    if as_json:
        import json as json_module

        print(json_module.dumps(as_rows(comparison.rows), indent=1))
    elif not quiet:
        console.print(rich_table(comparison.rows))
        folder = comparison.plan.output
        console.print(f"\n{folder}/report.html  report.md  quality.png", markup=False, highlight=False)
