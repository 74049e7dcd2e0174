"""The cells of one method drawn together into a row, and the rows as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from inlay.compare.cell import Record
from inlay.train.metrics import LOWER_IS_BETTER
from inlay.train.report import size


@dataclass
class Row:
    """One method over its seeds, trained on all data.

    Attributes:
        quality, spread: mean and sample standard deviation over seeds of the main metric (spread None for one seed).
        step: median seconds of an optimizer step.
        time: its ratio to full fine-tuning, by the same batches; None where full fine-tuning was not run.
        inference: figure -> {"unmerged", "merged"} as ratios to the base.
        low: rows of training data -> (mean, spread) of the main metric, the whole data included.
        error: why there is nothing to report.
    """

    label: str
    key: str
    records: list[Record]
    quality: float = float("nan")
    spread: float | None = None
    step: float = 0.0
    time: float | None = None
    inference: dict[str, dict[str, float]] = field(default_factory=dict)
    low: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    error: str = ""

    @property
    def first(self) -> Record:
        """A record that stands for what does not change from seed to seed."""
        return self.records[0]

    @property
    def peak(self) -> int | None:
        """Peak memory, the median over seeds."""
        known = [r.peak_bytes for r in self.records if r.peak_bytes is not None]
        return int(statistics.median(known)) if known else None

    @property
    def shown_quality(self) -> str:
        """`0.712 ± 0.008`."""
        return with_spread(self.quality, self.spread)


def with_spread(value: float, spread: float | None) -> str:
    """A value with its standard deviation.

    >>> with_spread(0.7123, 0.008)
    '0.712 ± 0.008'
    """
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def rows_of(records: Sequence[Record]) -> list[Row]:
    """One row for each label, best first; those that failed come last."""
    labels = list(dict.fromkeys(r.label for r in records))
    rows = [_row(label, [r for r in records if r.label == label]) for label in labels]
    full = next((row for row in rows if row.key == "full" and not row.error), None)
    for row in rows:
        if full is not None and not row.error:
            row.time = time_ratio(row.records, full.records)
    sound = [row for row in rows if not row.error]
    if not sound:
        return rows
    sign = 1 if sound[0].first.metric in LOWER_IS_BETTER else -1
    return sorted(sound, key=lambda row: sign * row.quality) + [row for row in rows if row.error]


def _row(label: str, records: list[Record]) -> Row:
    failed = [r for r in records if r.error]
    sizes = {r.size for r in records}
    whole = [r for r in records if r.size is None] or [r for r in records if r.size == max(s for s in sizes if s)]
    row = Row(label, records[0].key, [r for r in whole if not r.error])
    if failed:
        where = f"seed {failed[0].seed}" + (f", {failed[0].size} rows" if failed[0].size else "")
        row.error = f"{failed[0].error} ({where})" if row.records else failed[0].error
    if not row.records or any(r.error for r in whole):
        return row
    row.error = ""
    row.quality, row.spread = mean_and_spread([r.value for r in row.records])
    row.step = statistics.median(r.step for r in row.records)
    row.inference = inference_ratios(row.records)
    for count in sorted(sizes, key=lambda s: (s is None, s or 0)):
        values = [r.value for r in records if r.size == count and not r.error]
        if values:
            row.low[count if count is not None else row.first.rows] = mean_and_spread(values)
    return row


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample standard deviation where there are two values or more."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def time_ratio(ours: Sequence[Record], full: Sequence[Record]) -> float:
    """Seconds a step relative to full fine-tuning.

    The same seed gives the same batches, so steps are compared one by one and the median of their ratios is taken;
    where batch sizes or logging differ, medians of seconds a row are compared instead.
    """
    ratios = []
    for record in ours:
        other = next((r for r in full if r.seed == record.seed), None)
        if other is None or other.batch != record.batch or len(other.step_seconds) != len(record.step_seconds):
            continue
        ratios += [a / b for a, b in zip(record.step_seconds, other.step_seconds, strict=True) if b > 0]
    if ratios:
        return statistics.median(ratios)
    rate = [statistics.median(r.step / r.batch for r in records) for records in (ours, full)]
    return rate[0] / rate[1]


def inference_ratios(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """figure -> mode -> median over seeds of the time relative to the base."""
    figures: dict[str, dict[str, float]] = {}
    timed = next((r.inference for r in records if r.inference), {})
    for figure in (name for name, value in timed.items() if isinstance(value, dict)):
        for mode in ("unmerged", "merged"):
            found = [r.inference[figure] for r in records if mode in r.inference.get(figure, {})]
            if found:
                figures.setdefault(figure, {})[mode] = statistics.median(f[mode] for f in found)
    return figures


def percent(ratio: float | None) -> str:
    """A ratio in %; a dash where there is none."""
    return "–" if ratio is None else f"{100 * ratio:.0f} %"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Headings of the table."""
    sound = [row for row in rows if not row.error]
    figures = list(dict.fromkeys(figure for row in sound for figure in row.inference))
    metric = sound[0].first.metric if sound else "quality"
    names = ["method", metric, "trained", "of the base", "stored", "file", "peak memory", "step", "training time"]
    return names + [f"{figure}, {mode}" for figure in figures for mode in ("unmerged", "merged")]


def cells_of(row: Row, columns: Sequence[str]) -> list[str]:
    """The row as text; empty behind the name where the method failed."""
    if row.error:
        return [row.label, "not possible"] + ["–"] * (len(columns) - 2)
    first = row.first
    texts = [
        row.label,
        row.shown_quality,
        f"{first.trained:,}",
        f"{100 * first.trained / max(first.base, 1):.2f} %",
        f"{first.stored:,}",
        size(first.bytes),
        "–" if row.peak is None else size(row.peak),
        f"{1000 * row.step:.0f} ms",
        percent(row.time),
    ]
    for column in columns[len(texts) :]:
        figure, _, mode = column.rpartition(", ")
        texts.append(percent(row.inference.get(figure, {}).get(mode)))
    return texts


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, with what the columns mean and which methods failed."""
    columns = columns_of(rows)
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(cells_of(row, columns)) + " |" for row in rows]
    parts = ["\n".join(lines), MEANING]
    sound = [row for row in rows if not row.error]
    if any(len(row.low) > 1 for row in sound):
        counts = sorted({count for row in sound for count in row.low})
        low = [
            "| trained on | " + " | ".join(f"{count:,} rows" for count in counts) + " |",
            "|---|" + "--:|" * len(counts),
        ]
        for row in sound:
            shown = (with_spread(*row.low[count]) if count in row.low else "–" for count in counts)
            low.append(f"| {row.label} | " + " | ".join(shown) + " |")
        parts.append("\n".join(low))
    failed = [f"* {row.label}: {row.error}" for row in rows if row.error]
    if failed:
        parts.append("Not possible here:\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


MEANING = (
    "Quality is that of the held-out rows after the last step, mean ± standard deviation over seeds. Trained counts "
    "the task head; stored is what the file holds. Peak memory is that of the whole run beyond the process at its "
    "start. Training time is that of a step relative to full fine-tuning on the same batches. Inference is relative to "
    "the base without the adapter; methods that are not linear cannot be merged (–)."
)


def findings(rows: Sequence[Row]) -> list[str]:
    """What the table says, in sentences."""
    sound = [row for row in rows if not row.error and row.key != "headonly"]
    if not sound:
        return []
    metric = sound[0].first.metric
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = sound[0]
    told = [f"Best {metric}: {best.label}, {best.shown_quality}."]
    margin = best.spread or 0.0
    near = [row for row in sound if sign * (best.quality - row.quality) <= margin and row is not best]
    if near and best.spread is not None:
        told.append(f"Within one standard deviation of it: {', '.join(row.label for row in near)}.")
    smallest = min([best, *near], key=lambda row: row.first.stored)
    if smallest is not best and best.spread is not None:
        told.append(f"The smallest of these is {smallest.label} with {size(smallest.first.bytes)}.")
    full = next((row for row in sound if row.key == "full"), None)
    if full is not None:
        better = [row.label for row in sound if sign * (row.quality - full.quality) > 0]
        told.append(
            f"{len(better) or 'None'} of the {len(sound) - 1} methods {'are' if len(better) > 1 else 'is'} above full "
            f"fine-tuning ({full.shown_quality})" + (f": {', '.join(better)}." if better else ".")
        )
        fastest = min((row for row in sound if row.time is not None), key=lambda row: row.time or 0.0)
        told.append(f"The shortest step is that of {fastest.label}, {percent(fastest.time)} of full fine-tuning.")
    lows = [row for row in sound if len(row.low) > 1]
    if lows:
        fewest = min(min(row.low) for row in lows)
        leader = max((row for row in lows if fewest in row.low), key=lambda row: sign * row.low[fewest][0])
        told.append(f"With {fewest} rows {leader.label} is best, {with_spread(*leader.low[fewest])}.")
    return told
