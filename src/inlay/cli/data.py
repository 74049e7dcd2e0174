"""`inlay data`: a file as the model will see it."""

from __future__ import annotations

import typer


def verb(
    file: list[str] = typer.Argument(..., help="Files, folders or hub names, as for train."),
    model: str = typer.Option(..., "--model", "-m", help="Whose tokenizer and chat template to use."),
    task: str = typer.Option(None, "--task", help="What to learn; found from the data when absent."),
    columns: str = typer.Option(None, "--columns", help="Columns of other names: prompt=question,completion=answer."),
    max_length: int = typer.Option(None, "--max-length", min=2, help="Tokens per row."),
    rows: int = typer.Option(3, "--rows", "-n", min=0, help="How many examples to show."),
    start: int = typer.Option(0, "--start", min=0, help="The first of them."),
    on_bad_row: str = typer.Option("error", "--on-bad-row", help="error, or skip: write bad rows aside."),
    picture: str = typer.Option(None, "--picture", help="Draw the lengths as a PNG here."),
) -> None:
    """Show rows as the model sees them, what is learned, and how long they are."""
    from inlay.config_loading import load

    flags = {"model": model, "data": file if len(file) > 1 else file[0], "task": task, "columns": columns}
    config = load(flags=flags | {"max_length": max_length, "on_bad_row": on_bad_row})

    from pathlib import Path

    from rich.console import Console

    from inlay.data import prepare
    from inlay.data.show import length_figure, length_table, show_row
    from inlay.train import models
    from inlay.train.narrate import escape
    from inlay.train.session import data_spec

    console = Console()
    tokenizer = models.load_tokenizer(config)
    model_config = models.load_config(config)
    prepared = prepare(data_spec(config, tokenizer, model_config), tokenizer, models.kind_of(model_config))
    console.print(f"[bold]{escape(prepared.format)}[/]", highlight=False)
    for line in prepared.report.lines():
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(length_table(prepared))
    marks = console.color_system is None
    for index in range(start, min(start + rows, len(prepared.train))):
        console.print()
        console.print(show_row(prepared.train, index, tokenizer, marks=marks), soft_wrap=True)
    if picture is not None:
        console.print(f"\nlengths drawn in {length_figure(prepared, Path(picture))}", highlight=False)
