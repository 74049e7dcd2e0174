"""Rows given on the command line, and what is printed for each: shared by `predict` and `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from inlay.errors import ConfigError, nearest

Rows = str | Sequence[Any]


def given(file: str | None, texts: list[str] | None, pairs: list[str] | None, option: str = "--text") -> Rows:
    """The rows: a file, or texts, or pairs of texts.

    Raises:
        ConfigError: neither, both, or not as many second texts as first ones.
    """
    if bool(file) == bool(texts):
        raise ConfigError(f"give a file or {option}, " + ("not both" if file else "for example " + option + ' "..."'))
    if file:
        if not Path(file).exists():
            raise ConfigError(f"{file}: there is no such file; a text is given with {option}")
        return file
    texts = texts or []
    if not pairs:
        return texts
    if len(pairs) != len(texts):
        raise ConfigError(f"{len(texts)} texts and {len(pairs)} second texts; give as many")
    return list(zip(texts, pairs, strict=True))


def checked_vote(vote: str) -> Literal["majority", "mean"]:
    """How adapters vote.

    Raises:
        ConfigError: neither of the two ways.
    """
    if vote not in ("majority", "mean"):
        raise ConfigError(f"--vote {vote}: {nearest(vote, ['majority', 'mean'])}")
    return "majority" if vote == "majority" else "mean"


def say(quiet: bool) -> Callable[[str], None] | None:
    """Remarks on stderr, so that stdout holds results alone."""
    if quiet:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return lambda text: console.print(f"{text} ...", style="dim", markup=False, highlight=False)


def put(results: Iterable[dict[str, Any]], rows: Rows, output: str | None, *, as_json: bool) -> None:
    """Print one line for each result, or write JSON lines to a file that appears whole."""
    if output is not None:
        from inlay.folders import replace_text

        lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in results]
        replace_text(Path(output), "".join(lines))
        print(f"{len(lines)} rows in {output}")
        return
    for result in results:
        print(json.dumps(result, ensure_ascii=False) if as_json else _line(result, named=isinstance(rows, str)))


def _line(result: dict[str, Any], *, named: bool) -> str:
    """`label  score`, the tags, or the text, after the origin where rows came from a file."""
    if "generated" in result:
        return str(result["generated"])
    shown: list[str] = [result["origin"]] if named else []
    if "top" in result:
        shown += [f"{label} {score:.4f}" for label, score in result["top"].items()]
    elif "label" in result:
        shown += [result["label"], f"{result['score']:.4f}"]
    elif "labels" in result:
        shown.append(", ".join(result["labels"]) or "(none)")
    elif "tags" in result:
        shown.append(" ".join(result["tags"]))
    else:
        shown.append(str(result.get("value", result.get("answer"))))
    return "\t".join(shown)
