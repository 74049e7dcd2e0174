"""`inlay methods`: what can be trained, with equation and source."""

from __future__ import annotations

import typer


def verb(
    name: str = typer.Argument(None, help="Show one method whole: its equation, settings and BibTeX."),
    json: bool = typer.Option(False, "--json", help="As JSON, for programs."),
) -> None:
    """List every method with its equation and its source."""
    from inlay.cli import _methods

    _methods.show(name, as_json=json)
