"""What came out of a sweep: rows of results, a Markdown page, and a plot of the metric over each varied setting."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlay.config import RunConfig
from inlay.folders import read_json, replace_text
from inlay.train.metrics import MAIN, greater_is_better
from inlay.train.narrate import Narrator, escape

FIXED = ("loss", "trained_parameters", "steps", "seconds")


def rows_of(runs: Sequence[tuple[dict[str, str], Path]], config: RunConfig) -> tuple[list[dict[str, Any]], str, bool]:
    """A row for each run, the best first; the metric that decides; and whether more of it is better."""
    task = str(read_json(runs[0][1] / "data.json")["task"])
    metric = config.metric_for_best_model or MAIN[task]
    greater = config.greater_is_better if config.greater_is_better is not None else bool(greater_is_better(metric))
    rows = []
    for settings, folder in runs:
        results = read_json(folder / "results.json")
        measured = list(results.values())[-1] if results else {}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last = [line for line in lines if line["split"] == "train"][-1]
        adapter = read_json(folder / "adapter" / "adapter.json")
        rows.append(
            {
                "settings": settings,
                metric: measured.get(metric),
                "loss": measured.get("loss"),
                "trained_parameters": adapter["trained_parameters"],
                "steps": last["step"],
                "seconds": round(last["seconds"], 1),
                "run": folder.name,
            }
        )
    worst = float("-inf") if greater else float("inf")
    rows.sort(key=lambda row: worst if row[metric] is None else row[metric], reverse=greater)
    return rows, metric, greater


def write(folder: Path, rows: Sequence[dict[str, Any]], metric: str, keys: Sequence[str], *, greater: bool) -> None:
    """`README.md`, `results.json` and `sweep.png` in the folder of the sweep."""
    replace_text(folder / "results.json", json.dumps(list(rows), indent=1))
    order = f"Best first: {'most' if greater else 'least'} {metric} on the held-out rows."
    text = f"# Sweep over {', '.join(keys)}\n\n{order}\n\n{markdown(rows, metric)}\n\n![sweep](sweep.png)\n"
    replace_text(folder / "README.md", text)
    aside = folder / ".writing-sweep.png"
    aside.write_bytes(plot(rows, metric, keys))
    os.replace(aside, folder / "sweep.png")


def _cells(rows: Sequence[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    measured = list(dict.fromkeys([metric, *FIXED]))
    header = [*rows[0]["settings"], *(name.replace("_", " ") for name in measured)]
    return header, [[*row["settings"].values(), *(_shown(row[name]) for name in measured)] for row in rows]


def markdown(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The table."""
    header, cells = _cells(rows, metric)
    count = len(rows[0]["settings"])
    rule = ["---"] * count + ["---:"] * (len(header) - count)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *cells])


def show(narrator: Narrator, rows: Sequence[dict[str, Any]], metric: str) -> None:
    """The table on the console."""
    from rich.table import Table

    header, cells = _cells(rows, metric)
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index < len(rows[0]["settings"]) else "right")
    for number, line in enumerate(cells):
        shown.add_row(*(f"[bold]{escape(cell)}[/]" if number == 0 else escape(cell) for cell in line))
    if not narrator.quiet:
        narrator.console.print(shown)


def plot(rows: Sequence[dict[str, Any]], metric: str, keys: Sequence[str]) -> bytes:
    """A PNG with a panel for each varied key: its values across, the metric up, lines joining runs equal otherwise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(keys), 3.4), layout="constrained")
    for position, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), position + 1)
        values = list(dict.fromkeys(row["settings"][key] for row in rows))
        numbers = [_number(value) for value in values]
        numeric = all(number is not None for number in numbers)
        where = {v: n if numeric else i for i, (v, n) in enumerate(zip(values, numbers, strict=True))}
        lines: dict[str, list[tuple[Any, float]]] = {}
        for row in rows:
            if row[metric] is not None:
                others = ", ".join(f"{k}={v}" for k, v in row["settings"].items() if k != key)
                lines.setdefault(others, []).append((where[row["settings"][key]], row[metric]))
        for name, points in sorted(lines.items()):
            points.sort()
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name, linewidth=1.2)
        positive = [n for n in numbers if n is not None and n > 0]
        if numeric and len(positive) == len(values) and max(positive) > 5 * min(positive):
            axes.set_xscale("log")
        if not numeric:
            axes.set_xticks(range(len(values)), values)
        axes.set_xlabel(key)
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
        if 1 < len(lines) <= 8:
            axes.legend(fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
