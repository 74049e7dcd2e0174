"""A number for every place of a model, as a picture: blocks by kind of module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from inlay.anatomy.base import Site
from inlay.anatomy.roles import role_of, roles


def by_layer(
    model: nn.Module, sites: Sequence[Site], values: Sequence[float]
) -> tuple[list[str], list[str], list[list[float]]]:
    """Arranges one value for each site as blocks (rows) by roles (columns); NaN where there is none.

    Several values at one place (experts) are averaged. Sites outside of the blocks come last, as columns by their path.
    """
    from inlay.anatomy import anatomy

    known = roles(anatomy(model))
    cells: dict[tuple[str, str], list[float]] = {}
    for site, value in zip(sites, values, strict=True):
        outside = site.layer is None
        row = "other" if outside else f"{site.stack} {site.layer}".strip()
        column = site.leave if outside else role_of(site, known)
        cells.setdefault((row, column), []).append(float(value))
    rows = list(dict.fromkeys(sorted((r for r, _ in cells), key=lambda r: r == "other")))
    columns = list(dict.fromkeys(c for _, c in cells))
    table = [[_mean(cells.get((r, c), ())) for c in columns] for r in rows]
    return rows, columns, table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    title: str,
    unit: str,
    path: str | None = None,
) -> Any:
    """Draws a table of numbers, each written into its cell.

    Args:
        rows, columns: their labels.
        values: one list for each row; NaN leaves a cell empty.
        title, unit: what the numbers are.
        path: write the picture there, in the format of the suffix.

    Returns:
        A matplotlib figure, tied to no window and no global state.
    """
    import numpy as np
    from matplotlib.figure import Figure

    table = np.asarray(values, dtype=float)
    figure = Figure(figsize=(1.6 + 0.75 * len(columns), 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    if np.isfinite(table).any():
        figure.colorbar(image, ax=axes, label=unit)
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for i, j in np.argwhere(np.isfinite(table)):
            color = "black" if table[i, j] > middle else "white"
            axes.text(j, i, f"{table[i, j]:.3g}", ha="center", va="center", color=color, fontsize=7)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
