"""The rows of a comparison on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from inlay.compare.table import Row, cells_of, columns_of


def rich_table(rows: Sequence[Row]) -> Table:
    """The columns that fit a terminal; the report has all of them."""
    columns = columns_of(rows)
    chosen = [i for i, name in enumerate(columns) if name not in ("stored", "of the base", "step", "peak memory")][:6]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i in chosen:
        table.add_column(columns[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        cells = cells_of(row, columns)
        table.add_row(*(cells[i] for i in chosen))
    return table


def as_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain values, for programs."""
    return [
        {"label": row.label, "error": row.error}
        if row.error
        else {
            "label": row.label,
            "metric": row.first.metric,
            "quality": row.quality,
            "spread": row.spread,
            "trained": row.first.trained,
            "stored": row.first.stored,
            "bytes": row.first.bytes,
            "peak_bytes": row.peak,
            "step_seconds": row.step,
            "training_time": row.time,
            "inference": row.inference,
            "low_data": {count: list(value) for count, value in row.low.items()},
        }
        for row in rows
    ]
