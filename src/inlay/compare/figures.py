"""The figures of the page, as SVG that follows the reader's light or dark theme, and one PNG for elsewhere.

They are drawn with fixed stand-in colours, which the SVG text then exchanges for the page's CSS variables.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inlay.compare.table import Row
from inlay.train.metrics import LOWER_IS_BETTER

INK, GRID = "#010203", "#040506"
"""Stand-ins for `var(--ink)` and `var(--line)`."""
GHOST = "#070809"
"""Stand-in for `var(--ghost)`: the other methods behind the one that a small panel is about."""

FAMILIES = {
    "low rank": ("#3b82d6", ("lora", "dora", "adalora")),
    "bottleneck": ("#e0822b", ("bottleneck", "inlay", "multihead")),
    "prefix and prompt": ("#2f9e6a", ("prefix", "ptuningv2", "prompt", "ptuning")),
    "vectors and sparse": ("#d1527a", ("bitfit", "ia3", "diffpruning")),
    "mixes": ("#8b63d1", ("mam", "unipelt")),
    "yardsticks": ("#7d8590", ("full", "headonly")),
}
OTHER = ("mixes", FAMILIES["mixes"][0])


def family_of(key: str) -> tuple[str, str]:
    """The family of a method's lower-case name, and its colour; mixes of one's own count as mixes."""
    for family, (colour, keys) in FAMILIES.items():
        if key in keys:
            return family, colour
    return OTHER


def quality(rows: Sequence[Row]) -> str:
    """Quality against trained parameters."""
    return _svg(_scatter(_sound(rows)), "Held-out quality against trained parameters, one point for each method")


def curves(rows: Sequence[Row]) -> str:
    """Held-out quality by step: one small panel for each method, the others behind it."""
    sound = _sound(rows)

    def draw(axes: Any, row: Row, highlighted: bool) -> None:
        records = row.records if highlighted else row.records[:1]
        for record in records:
            _line(axes, record.curve, row, highlighted)

    figure = _panels(sound, draw, "step", sound[0].first.metric)
    return _svg(figure, "Held-out quality by step for each method")


def low_data(rows: Sequence[Row]) -> str:
    """Quality by the number of training rows; empty where there is one number only."""
    sound = [row for row in _sound(rows) if len(row.low) > 1]
    if not sound:
        return ""

    def draw(axes: Any, row: Row, highlighted: bool) -> None:
        points = sorted((count, mean) for count, (mean, _) in row.low.items())
        _line(axes, points, row, highlighted, marker="o")
        if highlighted:
            for count, (mean, spread) in row.low.items():
                if spread is not None:
                    axes.plot([count, count], [mean - spread, mean + spread], color=family_of(row.key)[1], linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()

    counts = sorted({count for row in sound for count in row.low})
    figure = _panels(sound, draw, "rows to train on", sound[0].first.metric)
    return _svg(figure, "Held-out quality by number of training rows for each method")


def times(rows: Sequence[Row]) -> str:
    """Training time and inference time beside their yardsticks; empty where neither was measured."""
    sound = _sound(rows)
    marks: list[tuple[str, dict[str, float], dict[str, float]]] = []
    if any(row.time is not None for row in sound):
        known = {r.label: r.time for r in sound if r.time is not None}
        marks.append(("training step, full fine-tuning = 1", known, {}))
    for figure in dict.fromkeys(f for row in sound for f in row.inference):
        beside, merged = (
            {row.label: row.inference[figure][mode] for row in sound if mode in row.inference.get(figure, {})}
            for mode in ("unmerged", "merged")
        )
        marks.append((f"inference, {figure}, base = 1", beside, merged))
    if not marks:
        return ""
    figure = _figure(9.6, 0.8 + 0.24 * len(sound))
    panels = figure.subplots(1, len(marks), sharey=True, squeeze=False)[0]
    order = list(reversed(sound))
    for axes, (title, values, merged) in zip(panels, marks, strict=True):
        for y, row in enumerate(order):
            if row.label in values:
                axes.plot([1, values[row.label]], [y, y], color=GRID, linewidth=1.2, zorder=1)
                axes.plot(values[row.label], y, "o", color=family_of(row.key)[1], markersize=5.5)
            if row.label in merged:
                axes.plot(merged[row.label], y, "o", color=family_of(row.key)[1], markersize=5.5, fillstyle="none")
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(order)), [row.label for row in order])
        _plain(axes, "x")
    return _svg(figure, "Training and inference time of each method relative to full fine-tuning and to the base")


def picture(rows: Sequence[Row], path: Path) -> None:
    """Quality against trained parameters as a PNG on white."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    figure = _scatter(_sound(rows))
    for artist in figure.findobj():
        if isinstance(artist, Text):
            artist.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for get, put in (("get_color", "set_color"), ("get_edgecolor", "set_edgecolor")):
            value = getattr(artist, get, lambda: None)()
            if isinstance(value, str) and value in (INK, GRID):
                getattr(artist, put)("#20242a" if value == INK else "#d9dde3")
    figure.savefig(path, dpi=150, facecolor="white")


# -- drawing ----------------------------------------------------------------------------------------------------------


def _sound(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.error]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any, grid: str = "both") -> None:
    """Few lines, all in the page's ink."""
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)


def _line(axes: Any, points: Sequence[tuple[float, float]], row: Row, highlighted: bool, **style: Any) -> None:
    if points:
        colour, width = (family_of(row.key)[1], 1.8) if highlighted else (GHOST, 0.8)
        style = style if highlighted else {}
        axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=width, markersize=3, zorder=2 + highlighted, **style
        )


def _panels(rows: Sequence[Row], draw: Callable[[Any, Row, bool], None], across: str, up: str) -> Any:
    """Small multiples with common axes: one panel a row, all other rows in grey behind it."""
    columns = min(len(rows), min((5, 6, 4), key=lambda count: -len(rows) % count))  # as few empty places as can be
    lines = math.ceil(len(rows) / columns)
    figure = _figure(9.6, 0.5 + 1.55 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(rows):
            axes.set_visible(False)
            continue
        row = rows[index]
        for other in rows:
            if other is not row:
                draw(axes, other, False)
        draw(axes, row, True)
        axes.set_title(row.label, fontsize=9, pad=3)
        _plain(axes)
        if index + columns >= len(rows):
            axes.tick_params(labelbottom=True)
    figure.supxlabel(across, fontsize=9, color=INK)
    figure.supylabel(up, fontsize=9, color=INK)
    return figure


def _scatter(rows: Sequence[Row]) -> Any:
    figure = _figure(9.6, 5.0)
    axes = figure.subplots()
    for row in rows:
        family, colour = family_of(row.key)
        axes.errorbar(
            max(row.first.trained, 1), row.quality, yerr=row.spread, fmt="o", color=colour, markersize=7, elinewidth=1,
            capsize=0, label=family,
        )  # fmt: skip
    full = next((row for row in rows if row.key == "full"), None)
    if full is not None:
        axes.axhline(full.quality, color=family_of("full")[1], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    metric = rows[0].first.metric
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.1)
    down = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    axes.set_xlabel("trained parameters", fontsize=9)
    axes.set_ylabel(f"held-out {metric}{down}", fontsize=9)
    _plain(axes)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    ordered = [family for family in FAMILIES if family in handles]
    figure.legend(
        [handles[f] for f in ordered], ordered, loc="outside upper left", ncols=len(ordered), frameon=False, fontsize=9,
        labelcolor=INK, handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    figure.draw_without_rendering()
    _label(axes, rows)
    return figure


def _label(axes: Any, rows: Sequence[Row], height: float = 12.0) -> None:
    """Names beside their points, each at the free place nearest to its point; a thin line leads back from far ones."""
    size, points_a_pixel = axes.get_window_extent(), 72 / axes.figure.dpi
    points = [axes.transData.transform((max(row.first.trained, 1), row.quality)) for row in rows]
    taken = [(x - 6.0, y - 6.0, x + 6.0, y + 6.0) for x, y in points]
    for row, (x, y) in sorted(zip(rows, points, strict=True), key=lambda pair: -pair[1][1]):
        width = 5.6 * len(row.label) + 2
        sides = ((9.0, 0.0), (-width - 9.0, 4.0), (-width / 2, 7.0))  # right, left, above or below, and their price
        shifts = sorted((abs(dy) + price, dx, dy) for dy in (6.0 * k for k in range(-12, 13)) for dx, price in sides)
        for _, dx, dy in shifts:
            box = (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
            inside = box[0] >= size.x0 and box[2] <= size.x1 and box[1] >= size.y0 and box[3] <= size.y1
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                break
        else:
            dx, dy = 9.0, 0.0
            box = (x + dx, y - height / 2, x + dx + width, y + height / 2)
        taken.append(box)
        far = abs(dy) > 12
        axes.annotate(
            row.label, (max(row.first.trained, 1), row.quality), xytext=(dx * points_a_pixel, dy * points_a_pixel),
            textcoords="offset points", color=INK, fontsize=8.5, va="center",
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.8, "shrinkB": 4} if far else None,
        ).set_in_layout(False)  # fmt: skip


def _svg(figure: Any, title: str) -> str:
    """The figure as an `<svg>` element in the page's colours, its text as text."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "inlay", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in ((INK, "--ink"), (GRID, "--line"), (GHOST, "--ghost")):
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r'font: ([^"]*?)[^ ;"]*sans-serif[^";]*', r"font: \1system-ui, sans-serif", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"| height="[\d.]+pt"| width="[\d.]+pt"', "", svg, count=2)
    prefix = f"f{zlib.crc32(title.encode()):x}"  # ids are page-wide, and every figure begins to count at the same one
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
