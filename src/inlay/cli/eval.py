"""`inlay eval`: measure a finished run again, on its held-out rows or on a file."""

from __future__ import annotations

import typer


def verb(
    run: str = typer.Argument(..., help="A run folder, or a checkpoint in it."),
    data: str = typer.Option(None, "--data", "-d", help="A file with labels; the run's own held-out rows by default."),
    adapter: str = typer.Option(None, "--adapter", help="Another adapter folder than RUN/adapter."),
    base: bool = typer.Option(False, "--base", help="Measure the model without the adapter too."),
    together: list[str] = typer.Option(None, "--with", help="Another run of the same classes that votes; again."),
    vote: str = typer.Option("majority", "--vote", help="With --with: majority, or mean of the log-probabilities."),
    cpu: bool = typer.Option(False, "--cpu", help="Stay on the CPU."),
    json: bool = typer.Option(False, "--json", help="As JSON, for programs."),
) -> None:
    """Measure a run on held-out rows."""
    from rich.console import Console

    from inlay.cli._rows import checked_vote
    from inlay.train.narrate import Narrator
    from inlay.train.trained import open_trained

    narrator = Narrator(Console(), quiet=json)
    words = ["use_cpu=true"] if cpu else []
    others, chosen = together or [], checked_vote(vote)
    trained = open_trained(run, adapter=adapter, words=words, say=narrator.say, others=others, vote=chosen)
    sets = trained.evaluate(data)
    title = f"{len(others) + 1} x {trained.title}" if others else trained.title
    results = {name if len(sets) > 1 else title: metrics for name, metrics in sets.items()}
    if base:
        without = trained.evaluate_base(data)
        results = {f"untouched{f' {n}' if len(sets) > 1 else ''}": m for n, m in without.items()} | results
    if json:
        import json as json_module

        print(json_module.dumps(results, indent=1))
    else:
        narrator.results(results, trained.facts.task)
