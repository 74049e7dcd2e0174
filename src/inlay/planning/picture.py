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

    Activations kept and computed again stand side by side where both were worked out.

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

    bars = _bars(made, base)
    if not bars:
        raise ConfigError(f"the plan has nothing on {base!r} to draw; it has {sorted({c.base for c in made.costs})}")
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(bars))
    left = [0.0] * len(bars)
    for part, colour in PARTS.items():
        widths = [getattr(cost.memory, part) / GIB for _, cost in bars]
        axes.barh(places, widths, left=left, color=colour, label=part, height=0.72)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.annotate(
            f"{total:.3g}", (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(places, [name for name, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    if made.capacity is not None:
        _limit(axes, made.capacity / GIB, max(left))
    axes.set_xlabel(f"GiB at the peak of a step of {made.batch} x {made.length} tokens")
    axes.set_title(_title(made, base), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False,
        ncols=len(PARTS),
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.9 / (0.9 + 0.3 * len(bars)) * 0.55),
    )
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise ConfigError(f"picture: {path} cannot be written: {error}") from error
    return figure


def _bars(made: Plan, base: str) -> list[tuple[str, Cost]]:
    methods = list(dict.fromkeys(c.method for c in made.costs))
    several = len(methods) > 2  # the first is full fine-tuning
    chosen = [c for c in made.costs if c.base == base or not several]
    both = len({c.checkpointing for c in chosen}) > 1
    bars = []
    for cost in sorted(chosen, key=lambda c: (methods.index(c.method), list(BASES).index(c.base), c.checkpointing)):
        name = cost.method if several else f"{cost.method} on {BASES[cost.base].title}"
        bars.append((f"{name}, again" if both and cost.checkpointing else name, cost))
    return bars


def _limit(axes: Any, capacity: float, longest: float) -> None:
    if capacity < 3 * longest:
        axes.set_xlim(0, max(1.1 * longest, 1.08 * capacity))
        axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"{capacity:.3g} GiB", (capacity, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
                      textcoords="offset points", va="top", fontsize=8)  # fmt: skip


def _title(made: Plan, base: str) -> str:
    again = any(c.checkpointing for c in made.costs)
    where = f", base in {BASES[base].title}" if len({c.method for c in made.costs}) > 2 else ""
    note = "   (again: activations computed again in the backward pass)" if again else ""
    return f"{made.model}, {made.parameters / 1e9:.3g} B parameters{where}{note}"
