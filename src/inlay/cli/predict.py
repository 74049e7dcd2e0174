"""`inlay predict`: what a trained classifier, tagger or regressor says of new rows."""

from __future__ import annotations

import typer


def verb(
    run: str = typer.Argument(..., help="A run folder, or a checkpoint in it."),
    file: str = typer.Argument(None, help="Rows in any form that train reads; labels may be missing."),
    text: list[str] = typer.Option(None, "--text", "-t", help="A text; again for several."),
    pair: list[str] = typer.Option(None, "--pair", help="The second text of each, where the run has pairs."),
    top: int = typer.Option(1, "--top", min=1, help="Name this many classes, most likely first."),
    output: str = typer.Option(None, "--output", "-o", help="Write JSON lines to this file."),
    adapter: str = typer.Option(None, "--adapter", help="Another adapter folder than RUN/adapter."),
    together: list[str] = typer.Option(None, "--with", help="Another run of the same classes that votes; again."),
    vote: str = typer.Option("majority", "--vote", help="With --with: majority, or mean of the log-probabilities."),
    cpu: bool = typer.Option(False, "--cpu", help="Stay on the CPU."),
    json: bool = typer.Option(False, "--json", help="Print JSON lines."),
) -> None:
    """Predict classes, numbers, tags or answers for new rows."""
    from inlay.cli import _rows

    rows = _rows.given(file, text, pair)
    from inlay.train.trained import open_trained

    words = ["use_cpu=true"] if cpu else []
    others, chosen = together or [], _rows.checked_vote(vote)
    trained = open_trained(run, adapter=adapter, words=words, say=_rows.say(json), others=others, vote=chosen)
    if trained.facts.task == "token-classification" and not isinstance(rows, str):
        rows = [row.split() for row in rows]
    _rows.put(trained.predict(rows, top), rows, output, as_json=json)
