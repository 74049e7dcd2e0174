"""`inlay sweep`: many runs that differ in a few settings, and a table of what came out."""

from __future__ import annotations

import typer

SETTINGS = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def verb(
    context: typer.Context,
    random: int = typer.Option(None, "--random", help="Make so many random runs of the grid instead of all."),
    seed: int = typer.Option(0, "--seed", help="Which ones."),
    together: int = typer.Option(8, "--together", help="Most runs in one pass over the base; 1: one after another."),
    output_dir: str = typer.Option(None, "--output-dir", "-o", help="The folder of the sweep."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing."),
    json: bool = typer.Option(False, "--json", help="Print the rows as JSON at the end, and nothing else."),
) -> None:
    """Train over a grid of settings, side by side where runs share the base.

    inlay sweep RUN.yaml learning_rate=1e-4,2e-4 method.rank=4,8,16 [key=value ...]

    A key with several values is varied, the others are as in `inlay train`. Called again, it goes on.
    """
    from inlay.sweep.space import Space

    words = list(context.args)
    file = next((word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word), None)
    space = Space.of([word for word in words if word != file])
    points = space.grid() if random is None else space.sample(random, seed)

    from rich.console import Console

    from inlay.sweep.run import sweep

    swept = sweep(
        file, space, points, output_dir=output_dir, most_together=together, console=Console(), quiet=quiet or json
    )
    if json:
        import json as writer

        print(writer.dumps({"folder": str(swept.folder), "metric": swept.metric, "runs": swept.rows}))
