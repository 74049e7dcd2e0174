"""`inlay train`: a model and a data file become a trained adapter."""

from __future__ import annotations

from collections.abc import Mapping

import typer

SETTINGS = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def verb(
    context: typer.Context,
    model: str = typer.Option(None, "--model", "-m", help="Folder or hub name of the pretrained model."),
    data: list[str] = typer.Option(None, "--data", "-d", help="File, folder or hub name; again for a mixture."),
    eval_data: list[str] = typer.Option(None, "--eval-data", help="Held-out data; else a part of the data."),
    method: str = typer.Option(None, "--method", help="What is trained; settings as --method.rank 8."),
    task: str = typer.Option(None, "--task", help="What to learn; found from the data when absent."),
    columns: str = typer.Option(None, "--columns", help="Columns of other names: prompt=question,completion=answer."),
    output_dir: str = typer.Option(None, "--output-dir", "-o", help="The run folder."),
    resume: str = typer.Option(None, "--resume", help="Go on from a run folder or one of its checkpoints."),
    allow_changed: bool = typer.Option(False, "--allow-changed", help="Resume although something changed."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Print nothing."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON at the end, and nothing else."),
    keys: bool = typer.Option(False, "--keys", help="List every configuration key and leave."),
) -> None:
    """Train an adapter on a data file.

    inlay train --model M --data D [--method lora] [RUN.yaml] [key=value ...] [--any-key value ...]

    A YAML file, then key=value words, then flags; later ones win. Every key of --keys is a flag as well
    (--learning-rate 2e-4, --method.rank 8).
    """
    if keys:
        show_keys()
        return
    flags = {
        "model": model,
        "data": _one_or_more(data),
        "eval_data": _one_or_more(eval_data),
        "method": method,
        "task": task,
        "columns": columns,
        "output_dir": output_dir,
        "resume": resume,
        "allow_changed": allow_changed or None,
    }
    run(list(context.args), flags, quiet=quiet, as_json=json)


def _one_or_more(values: list[str] | None) -> str | list[str] | None:
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def run(words: list[str], flags: Mapping[str, object], *, quiet: bool, as_json: bool) -> None:
    """Read the configuration, whole and strictly, before anything heavy is imported; then train."""
    from inlay.config_loading import load

    file = next((word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word), None)
    words = [word for word in words if word != file]
    resumed = flags.get("resume")
    if file is None and isinstance(resumed, str) and flags.get("model") is None:
        file = _config_of(resumed)
    config = load(file, words, flags)

    from rich.console import Console

    from inlay.train.run import train

    result = train(config, console=Console(), quiet=quiet or as_json)
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(result), default=str))


def _config_of(resumed: str) -> str:
    """The configuration file of the run that is to be resumed."""
    import re
    from pathlib import Path

    from inlay.errors import CheckpointError

    folder = Path(resumed)
    run_folder = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder
    file = run_folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{run_folder} is not a run folder: it has no config.yaml")
    return str(file)


def show_keys() -> None:
    """Every key with its type, its default and its meaning."""
    from rich.console import Console
    from rich.table import Table

    from inlay.config import key_table

    table = Table("key", "type", "default", "meaning", box=None, pad_edge=False, header_style="bold")
    for row in key_table():
        table.add_row(*row)
    Console().print(table)
