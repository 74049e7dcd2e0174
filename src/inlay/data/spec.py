"""What is asked of the data, and what came of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from inlay.data.encode_template import Wording
    from inlay.data.encoded import Encoded
    from inlay.data.store import Counts


def default_cache_dir() -> Path:
    """Where tokenized data is kept when nothing is said: `INLAY_CACHE`, or `inlay` in the user's cache folder."""
    if named := os.environ.get("INLAY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inlay"


@dataclass
class DataSpec:
    """What to train and evaluate on.

    Attributes:
        data: a file, a folder, a hub name (`org/name:subset`), `demo`; with `#500`, a seeded sample of 500 rows of it.
            Several for a mixture.
        eval_data: rows to evaluate on; several sets by name. Without it, the part of `data` made for that (its
            validation or test split), else a held-out fraction.
        columns: role -> column, where the columns have names of their own.
        task: what to learn; found from the format and the model where absent.
        eval_fraction: part of the rows held out where there is no other evaluation data; seeded, by class.
        max_length: most tokens of an example; the tokenizer's own limit where absent, but at most `DEFAULT_MAX_LENGTH`.
        on_bad_row: stop with all errors, or write the rows aside, count them and go on.
        packing: put several examples into one sequence (`causal-lm`).
        seed: of samples and of the held-out part.
        weights: share of each set of `data` in an epoch; rows as they are where absent.
        streaming: tokenize rows when they are needed, not ahead; rows are still all read once to find the bad ones.
        cache_dir: where tokenized data is kept; `INLAY_CACHE` or `~/.cache/inlay` where absent.
        group_by_length: whether batches are meant to hold examples of like length (for `Batches`).
        positions: most tokens that the model takes, less those that a method adds; None where there is no limit.
        wording: how texts are put to a language model that answers with a word.
    """

    data: str | list[str]
    eval_data: str | list[str] | dict[str, str] | None = None
    columns: dict[str, str] | None = None
    task: str | None = None
    eval_fraction: float = 0.1
    max_length: int | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    packing: bool = False
    seed: int = 42
    weights: list[float] | None = None
    streaming: bool = False
    cache_dir: Path | None = None
    group_by_length: bool = True
    positions: int | None = None
    wording: Wording | None = None


@dataclass
class Report:
    """What became of the rows, in numbers and words.

    Attributes:
        sets: name -> rows, examples, skipped, cut, and where the first cut ones stand.
        notes: everything that was decided or changed on the way, one sentence each.
        skipped_files: where skipped rows were written.
        lengths: tokens per training example: min, median, mean, p95, max, total.
        classes: training examples of each class.
        max_length: most tokens of an example.
    """

    sets: dict[str, Counts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped_files: list[Path] = field(default_factory=list)
    lengths: dict[str, float] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    max_length: int = 0

    @property
    def rows(self) -> int:
        """Rows read."""
        return sum(counts.rows for counts in self.sets.values())

    @property
    def skipped(self) -> int:
        """Rows left out because they are bad."""
        return sum(counts.skipped for counts in self.sets.values())

    @property
    def truncated(self) -> int:
        """Examples that lost tokens to `max_length`."""
        return sum(counts.cut for counts in self.sets.values())

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report, a sentence per line."""
        lines = []
        for name, counts in self.sets.items():
            line = f"{name}: {_count(counts.rows, 'row')}"
            if counts.examples != counts.rows - counts.skipped:
                line += f", {_count(counts.examples, 'example')}"
            lines.append(line)
            if counts.skipped:
                lines.append(f"{name}: {_count(counts.skipped, 'bad row')} left out")
            if counts.cut:
                first = ", ".join(counts.cut_first)
                lines.append(
                    f"{name}: cut to max_length={self.max_length}: {_count(counts.cut, 'example')},"
                    f" {_count(counts.cut_tokens, 'token')} lost at the end (first: {first})"
                )
            if counts.lossy:
                first, lost = ", ".join(counts.lossy_first), " ".join(counts.lost[:20])
                lines.append(
                    f"{name}: the tokenizer does not know the characters {lost}, and they are lost in"
                    f" {_count(counts.lossy, 'row')} (first: {first})"
                )
            lines += [f"{name}: {count:,} {what}" for what, count in counts.notes.items()]
        lines += [f"bad rows are in {path}" for path in self.skipped_files]
        return lines + self.notes

    def measure(self, encoded: Encoded) -> None:
        """Fill in the lengths and classes of the training examples."""
        lengths = encoded.lengths
        if len(lengths):
            self.lengths = {
                "min": float(lengths.min()),
                "median": float(np.median(lengths)),
                "mean": float(lengths.mean()),
                "p95": float(np.percentile(lengths, 95)),
                "max": float(lengths.max()),
                "total": float(lengths.sum(dtype=np.int64)),
            }
        self.classes = encoded.class_counts()


@dataclass
class Prepared:
    """Data ready for training.

    Attributes:
        task: what is learned.
        format: what was detected and which column plays which role, in words.
        labels: the classes or tags in the order of their numbers; None where targets are numbers, texts or spans.
        train: the training examples.
        evals: the examples to evaluate on, by name; `eval` where there is one set.
        report: what became of the rows.
        multi_text: whether rows are pairs of texts.
        multi_label: whether a text can have several classes.
        columns: role -> column as found, to read further files alike.
        fingerprint: a hash of everything above: rows, tokens, split.
    """

    task: str
    format: str
    labels: list[str] | None
    train: Encoded
    evals: dict[str, Encoded]
    report: Report
    multi_text: bool
    multi_label: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def merged_notes(notes: Sequence[str]) -> list[str]:
    """Each note once, in order, with a count where it came several times."""
    counted = Counter(notes)
    return [note if n == 1 else f"{note} ({n} times)" for note, n in counted.items()]
