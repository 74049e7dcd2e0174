"""What one row can be, and what is said when it is not that.

A reader yields raw rows (column -> value), `parse` turns them into one of the records below, an encoder turns
records into tokens. Each of the three raises `RowError` for a wrong row; `BadRows` is where those errors end up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlay.errors import DataError

MOST_SHOWN = 20
"""Bad rows after which reading stops and all of them are reported at once."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Labelled:
    """One or two texts with a class, several classes, or a number (still as text)."""

    text: str
    pair: str | None
    label: str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words with one tag each."""

    tokens: list[str]
    tags: list[str] | None


@dataclass(frozen=True, slots=True)
class Spans:
    """A question, the context that holds its answers, and where each begins, in characters.

    No answers: there is none in the context. None: nothing is known of the answers.
    """

    question: str
    context: str
    answers: list[str] | None
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt and what should follow it. `plain` is the prompt for a tokenizer without chat template."""

    prompt: str
    plain: str
    references: list[str]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; `trained[i]` says whether message i is one to learn from."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Document:
    """Running text; `first` and `last` say whether a long document begins and ends here."""

    text: str
    first: bool = True
    last: bool = True


Record = Labelled | Tagged | Spans | Prompted | Chat | Document


def names_in(record: Record) -> list[str]:
    """The classes or tags that a record names."""
    if isinstance(record, Labelled) and record.label is not None:
        return [record.label] if isinstance(record.label, str) else list(record.label)
    return (record.tags or []) if isinstance(record, Tagged) else []


class RowError(ValueError):
    """One row that is not what it should be.

    Args:
        expected: what should stand there, in words ("a class name").
        column: the column at fault, where one is.
        value: what stands there instead.
        line: the line at fault, where it is not the row's first line.
    """

    def __init__(
        self, expected: str, *, column: str | None = None, value: object = _ABSENT, line: int | None = None
    ) -> None:
        self.expected, self.column, self.line = expected, column, line
        self.value = None if value is _ABSENT else shorten(value)
        where = f"column {column!r}: " if column is not None else ""
        what = f"{self.value}; " if self.value is not None else ""
        super().__init__(f"{where}{what}expected {expected}")


class BadRows:
    """Collects the rows that cannot be used: an error after `MOST_SHOWN` of them, or a file of them with `skip`."""

    def __init__(self, policy: Literal["error", "skip"], file: Path | None = None) -> None:
        if policy not in ("error", "skip"):
            raise DataError(f"on_bad_row is {policy!r}; expected 'error' or 'skip'")
        self.policy, self.file, self.count = policy, file, 0
        self.shown: list[str] = []

    def add(self, file: str, line: int, error: RowError, raw: object = None) -> None:
        """Take note of one bad row; raises when there are enough to report."""
        self.count += 1
        line = error.line or line
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(f"{file}:{line}: {error}")
        if self.policy == "skip" and self.file is not None:
            entry = {"file": file, "line": line, "column": error.column, "value": error.value, "reason": str(error)}
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({**entry, "row": raw}, ensure_ascii=True, default=repr) + "\n")
        if self.policy == "error" and self.count >= MOST_SHOWN:
            self.raise_if_any(stopped=True)

    def raise_if_any(self, *, stopped: bool = False) -> None:
        """Raise `DataError` with every bad row seen so far, unless they are to be skipped."""
        if self.policy == "skip" or not self.count:
            return
        rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
        head = f"{rows}; reading stopped there" if stopped else rows
        listing = "\n".join(f"  {line}" for line in self.shown)
        raise DataError(
            f"{head}:\n{listing}\nCorrect the file, or go on without these rows with on_bad_row=skip"
            " (they are written to a file and counted)."
        )


def shorten(value: object, width: int = 60) -> str:
    """`value` as Python prints it, cut in the middle."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 20]} ... {text[-12:]}"


def get_text(row: Mapping[str, Any], column: str, *, empty: bool = False) -> str:
    """The text in `column`. With `empty`, a missing or blank one is `""`.

    Raises:
        RowError: the value is missing, blank, not a text, or holds half of a surrogate pair (which no tokenizer takes).
    """
    value = row.get(column)
    if value is None:
        if empty:
            return ""
        raise RowError("a text", column=column, value="missing" if column not in row else None)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    if not isinstance(value, str):
        raise RowError(f"a text, not {type(value).__name__}", column=column, value=value)
    if not value.strip():
        if empty:
            return ""
        raise RowError("a text that is not empty", column=column, value=value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError("Unicode text without lone surrogates", column=column, value=value[error.start :]) from None
    return value


def get_label(row: Mapping[str, Any], column: str) -> str:
    """The class in `column` as text: a name, a whole number, a truth value; or a number for regression."""
    value = row.get(column)
    if value is None:
        raise RowError("a class or a number", column=column, value="missing" if column not in row else None)
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise RowError("a finite number", column=column, value=value)
        return repr(value)
    return get_text(row, column).strip()
