"""A plan as stacked bars: where the memory of each method goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inlay.errors import ConfigError
from inlay.planning.bases import BASES
from inlay.planning.plan import Cost, Plan

PARTS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer": "#c44e52",
    "activations": "#55a868",
    "scratch": "#b0b0b0",
}
"""Causes in the order in which they are stacked, and their colours."""

GIB = 1 << 30


def picture(made: Plan, path: str | Path, base: str = "bf16") -> Any:
    """Draws a bar for each method on `base`, or for each base where there is one method.

    Where activations kept and computed again were both worked out, the latter is a thin bar below. Figures of what does
    not fit are red, and bars several times as long as most are cut.

    Args:
        made: the plan.
        path: where to write it, in the format of the suffix (.png, .svg, .pdf).
        base: whose bars are drawn where there are several methods.

    Returns:
        The matplotlib figure, tied to no window.

    Raises:
        ConfigError: the plan has nothing on that base, or the suffix is no format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    bars = _bars(made, base)
    if not bars:
        raise ConfigError(f"the plan has nothing on {base!r} to draw; it has {sorted({c.base for c in made.costs})}")
    names = list(dict.fromkeys(name for name, _ in bars))
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    right = _right(made, [cost.peak / GIB for _, cost in bars])
    for name, cost in bars:
        several = sum(other == name for other, _ in bars) > 1
        _draw(axes, names.index(name), cost, right, thin=several and cost.checkpointing, thick=several)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, right)
    if made.capacity is not None and made.capacity / GIB < right:
        axes.axvline(made.capacity / GIB, color="black", linestyle="--", linewidth=1, zorder=1.5)
        axes.annotate(f"{made.capacity / GIB:.3g} GiB", (made.capacity / GIB, 1), xycoords=("data", "axes fraction"),
                      xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
    axes.set_xlabel(f"GiB at the peak of a step of {made.batch} x {made.length} tokens", fontsize=9)
    figure.suptitle(_title(made, base), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()]
    figure.legend(handles, list(PARTS), loc="outside lower center", frameon=False, ncols=len(PARTS), fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise ConfigError(f"picture: {path} cannot be written: {error}") from error
    return figure


def _draw(axes: Any, row: int, cost: Cost, right: float, *, thin: bool, thick: bool) -> None:
    """One stacked bar with its sum, cut where it leaves the picture."""
    place, height = (row + 0.29, 0.18) if thin else (row - 0.1, 0.5) if thick else (row, 0.6)
    left = 0.0
    for part, colour in PARTS.items():
        width = getattr(cost.memory, part) / GIB
        axes.barh(place, width, left=left, color=colour, height=height, zorder=2)
        left += width
    cut = left > 0.94 * right
    at, offset = (right, -4) if cut else (left, 4)
    axes.annotate(
        f"{left:.3g}" + (" ▸" if cut and left > right else ""), (at, place), xytext=(offset, 0),
        textcoords="offset points", va="center", ha="right" if cut else "left", fontsize=6.5 if thin else 8, zorder=3,
        color="#b3261e" if cost.fits is False else "black",
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def _right(made: Plan, peaks: list[float]) -> float:
    """Where the axis ends: behind the longest bar, unless a few are so long that the others could not be read."""
    ordered = sorted(peaks)
    most = 3 * ordered[(3 * (len(ordered) - 1)) // 4]
    capacity = 0.0 if made.capacity is None else made.capacity / GIB
    end = 1.12 * min(ordered[-1], most)
    return max(end, 1.08 * capacity) if capacity < 3 * ordered[-1] else end


def _bars(made: Plan, base: str) -> list[tuple[str, Cost]]:
    """What is drawn, each with the name of its place: a method, or a base where there is one method."""
    methods = list(dict.fromkeys(c.method for c in made.costs))
    several = len(methods) > 2  # the first is full fine-tuning
    chosen = [c for c in made.costs if c.base == base or not several]
    chosen.sort(key=lambda c: (methods.index(c.method), list(BASES).index(c.base), c.checkpointing))
    return [(c.method if several else f"{c.method} on {BASES[c.base].title}", c) for c in chosen]


def _title(made: Plan, base: str) -> str:
    several = len({c.method for c in made.costs}) > 2
    where = f", base in {BASES[base].title}" if several else ""
    both = len({c.checkpointing for c in made.costs}) > 1
    note = "; thin bars: activations computed again in the backward pass" if both else ""
    return f"{Path(made.model).name}, {made.parameters / 1e9:.3g} B parameters{where}{note}"
