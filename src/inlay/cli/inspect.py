"""`inlay inspect`: which sites a model has for adapters to go to."""

from __future__ import annotations

import typer


def verb(
    model: str = typer.Argument(..., help="Folder or hub name of the model."),
    task: str = typer.Option(None, "--task", help="Load it with the head for this task."),
    sites: str = typer.Option(None, "--sites", help="List the places that a selector finds, such as attn.q or ffn."),
    revision: str = typer.Option(None, "--revision", help="Branch, tag or commit on the hub."),
) -> None:
    """Print the anatomy of a model: its blocks, and the sites that adapters can go to."""
    from rich.console import Console

    import inlay
    from inlay.config import RunConfig
    from inlay.train.models import load_any

    console = Console()
    loaded = load_any(RunConfig(model=model, data="", revision=revision), task)
    found = inlay.anatomy(loaded)
    if sites is None:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
        return
    for site in found.select(sites):
        span = site.leave if site.enter == site.leave else f"{site.enter} -> {site.leave}"
        console.print(f"{site.name:<12} {site.in_features:>6} -> {site.out_features:<6} {span}", highlight=False)
