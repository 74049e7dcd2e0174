"""Rows as the model sees them, with what it learns in colour, and how long rows are, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.data.examples import MASKED
from inlay.data.formats import ANSWERING, REGRESSION, SEQ2SEQ, SEQUENCE, TOKEN
from inlay.data.spec import Prepared

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from inlay.data.encoded import Encoded

LEARNED, GIVEN, ORIGIN = "bold green", "dim", "cyan"
MARKS = ("⟦", "⟧")
"""Around what is learned, where there is no colour."""


def show_row(encoded: Encoded, i: int, tokenizer: PreTrainedTokenizerBase, *, marks: bool = False) -> Text:
    """Example `i` decoded from its tokens: what is learned in green, what is given dim.

    Args:
        encoded: the examples.
        i: which one.
        tokenizer: the one they were encoded with.
        marks: put `MARKS` around what is learned, for output without colour.
    """
    from rich.text import Text

    row = encoded[i]
    learned = sum(label != MASKED for label in row["labels"]) if isinstance(row.get("labels"), list) else 0
    tokens = len(row["input_ids"])
    text = Text(f"{encoded.origin(i)}  {tokens} tokens", style=ORIGIN)
    if encoded.task not in (SEQUENCE, REGRESSION, ANSWERING):
        text.append(f", {learned} learned")
    text.append("\n")
    for part, is_learned in _parts(encoded, i, row, tokenizer):
        shown = f"{MARKS[0]}{part}{MARKS[1]}" if is_learned and marks else part
        text.append(shown, style=LEARNED if is_learned else GIVEN)
    return text


def _parts(
    encoded: Encoded, i: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    ids, task = row["input_ids"], encoded.task
    if task == TOKEN:
        yield from _tagged(ids, row.get("labels") or [], encoded, tokenizer)
    elif task == ANSWERING:
        start, end = row.get("start_positions", 0), row.get("end_positions", -1)
        inside = [start <= at <= end and end > 0 for at in range(len(ids))]
        yield from _runs(ids, inside, tokenizer)
    elif task in (SEQUENCE, REGRESSION, SEQ2SEQ):
        yield str(tokenizer.decode(ids)), False
        if "labels" in row:
            target = (
                str(tokenizer.decode(row["labels"]))
                if task == SEQ2SEQ
                else ", ".join(encoded.reference(i)) or "(no class)"
            )
            yield "\n-> ", False
            yield target, True
    else:
        labels = row.get("labels") or [MASKED] * len(ids)
        yield from _runs(ids, [label != MASKED for label in labels], tokenizer)


def _runs(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Stretches of tokens that are alike; each is what it adds to the text before it, so that blanks stay right."""
    before, begin = "", 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[begin]:
            text = str(tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False))
            yield (
                text[len(before) :] if text.startswith(before) else str(tokenizer.decode(ids[begin:at])),
                learned[begin],
            )
            before, begin = text, at


def _tagged(
    ids: list[int], labels: list[int], encoded: Encoded, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    names = encoded.labels.names or []
    starts = [at for at, label in enumerate(labels) if label != MASKED]
    last = max((at for at in range(len(ids)) if not _is_special(ids[at], tokenizer)), default=-1) + 1
    for start, end in zip(starts, [*starts[1:], last], strict=True):
        word, name = str(tokenizer.decode(ids[start:end])).strip(), names[labels[start]] if names else ""
        yield word, False
        if name and name != "O":
            yield f"/{name}", True
        yield " ", False


def _is_special(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    return token in tokenizer.all_special_ids and token != tokenizer.unk_token_id


def length_table(prepared: Prepared) -> Table:
    """Rows, tokens and lengths of each set."""
    import numpy as np
    from rich.table import Table

    table = Table("set", *("examples", "tokens", "shortest", "median", "95 %", "longest"), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, encoded in {"train": prepared.train, **prepared.evals}.items():
        lengths = encoded.lengths
        if len(lengths):
            values = (lengths.min(), np.median(lengths), np.percentile(lengths, 95), lengths.max())
            numbers = [len(lengths), int(lengths.sum(dtype=np.int64)), *(int(value) for value in values)]
            table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def length_figure(prepared: Prepared, path: Path) -> Path:
    """A histogram of the lengths of training and evaluation examples as a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths, limit = prepared.train.lengths, prepared.report.max_length
    longest = max([int(lengths.max(initial=1)), *(int(e.lengths.max(initial=1)) for e in prepared.evals.values())])
    bins = min(60, longest)
    axes.hist(lengths, bins=bins, range=(0, longest), label=f"train ({len(lengths):,})", color="#4477aa")
    for (name, encoded), colour in zip(prepared.evals.items(), ("#ee6677", "#228833", "#ccbb44"), strict=False):
        axes.hist(
            encoded.lengths,
            bins=bins,
            range=(0, longest),
            label=f"{name} ({len(encoded):,})",
            histtype="step",
            linewidth=1.5,
            color=colour,
        )
    p95 = prepared.report.lengths.get("p95", 0.0)
    axes.axvline(p95, color="#555555", linestyle=":", label=f"95 % of train: {p95:.0f}")
    if limit <= 1.2 * longest:
        axes.axvline(limit, color="black", linestyle="--", label=f"max_length: {limit}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("examples")
    axes.set_title(f"{prepared.task}: {prepared.report.lengths.get('total', 0):,.0f} training tokens", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
