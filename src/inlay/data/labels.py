"""What class numbers mean: the names of the classes, or that targets are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inlay.data.formats import REGRESSION, SEQUENCE, TOKEN, Format
from inlay.data.store import Store
from inlay.errors import DataError, nearest

FEW_ROWS = 20
"""Below this many rows, nothing is concluded from how many different labels there are."""


@dataclass(frozen=True)
class Labels:
    """What the class numbers mean.

    Attributes:
        names: class or tag of each number; None where targets are numbers, texts or spans.
        several: a text can have several classes (targets are 0/1 vectors of floats).
    """

    names: list[str] | None = None
    several: bool = False


def labels_of(form: Format, task: str | None, stores: Sequence[Store], where: str) -> tuple[str, Labels]:
    """The final task (numbers make it regression) and what class numbers mean."""
    if form.task not in (SEQUENCE, REGRESSION, TOKEN):
        return form.task, Labels()
    names = {name for store in stores for name in store.names}
    if form.task == TOKEN:
        return TOKEN, Labels(sorted(names, key=lambda name: (name != "O", name)))
    several = any(store.counts.several for store in stores)
    numbers = {name: number for name in names if (number := _number(name)) is not None}
    if task == REGRESSION and len(numbers) < len(names):
        wrong = sorted(names - set(numbers))[0]
        raise DataError(f"{where}: the label {wrong!r} is no number, and the task is {REGRESSION}")
    if task == REGRESSION or (task is None and len(numbers) == len(names) and any(n % 1 for n in numbers.values())):
        return REGRESSION, Labels()
    if len(names) < 2:
        raise DataError(f"{where}: all rows have the label {next(iter(names), '')!r}; expected two classes or more")
    rows = sum(len(store) for store in stores)
    if rows >= FEW_ROWS and len(names) > rows / 2 and not several:
        shown = ", ".join(map(repr, sorted(names)[:3]))
        raise DataError(
            f"{where}: column {form.roles['label']!r} has {len(names)} different labels in {rows} rows ({shown}, ...),"
            " so it holds texts rather than classes. To learn to write them: --columns prompt=...,completion=..."
        )
    whole = len(numbers) == len(names) and all(n % 1 == 0 for n in numbers.values())
    ordered = sorted(names, key=lambda name: numbers[name]) if whole else sorted(names)
    return SEQUENCE, Labels(ordered, several)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_known(labels: Labels, stores: Sequence[Store], where: str) -> None:
    """Raise `DataError` where an evaluation set has labels that the training data has not."""
    if labels.names is None:
        return
    unknown = sorted({name for store in stores for name in store.names} - set(labels.names))
    if unknown:
        listing = ", ".join(map(repr, unknown[:5]))
        raise DataError(
            f"the evaluation set {where!r} has labels that the training data has not: {listing}"
            f" ({nearest(unknown[0], labels.names)})"
        )
