"""What a finished run shows: the loss plot and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.train.metrics import LOWER_IS_BETTER


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def plot(run: Path, metric: str) -> Path | None:
    """Draw `loss.png`: training and held-out loss, and beside them the metric that decides, where it is another one.

    Returns None where nothing was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = read_log(run)
    train = [(r["step"], r["loss"]) for r in log if r["split"] == "train"]
    splits = list(dict.fromkeys(r["split"] for r in log if r["split"] != "train"))
    if not train:
        return None
    beside = metric != "loss" and any(metric in r for r in log)
    figure = Figure(figsize=(10 if beside else 6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if beside else 1, squeeze=False)[0]
    axes[0].plot(*zip(*train, strict=True), color="0.7", linewidth=1, label="training")
    axes[0].plot(*zip(*_smooth(train), strict=True), color="tab:blue", label="training, smoothed")
    for ax in axes:
        ax.set_prop_cycle(color=["tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"])
    for split in splits:
        _curve(axes[0], log, split, "loss")
        if beside:
            _curve(axes[1], log, split, metric)
    for ax, name in zip(axes, ("loss", metric), strict=False):
        ax.set(xlabel="step", ylabel=name)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _curve(ax: Any, log: Sequence[Mapping[str, Any]], split: str, metric: str) -> None:
    points = [(r["step"], r[metric]) for r in log if r["split"] == split and metric in r]
    if not points:
        return
    title = "held-out" if split == "eval" else f"held-out {split}"
    ax.plot(*zip(*points, strict=True), "o-", label=title)
    lower = metric in LOWER_IS_BETTER
    best = (min if lower else max)(points, key=lambda point: point[1])
    # Inside the axes: towards the side where there is room, and off the curve.
    right = best[0] > (points[0][0] + points[-1][0]) / 2
    place: dict[str, Any] = {"xytext": (-2 if right else 2, 8), "ha": "right" if right else "left"}
    ax.annotate(f"{best[1]:.4g}", best, textcoords="offset points", va="bottom", fontsize=8, **place)
    ax.margins(y=0.12)


def _smooth(points: Sequence[tuple[int, float]], keep: float = 0.9) -> list[tuple[int, float]]:
    """Exponential mean, corrected for its start."""
    mean, weight, out = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append((step, mean / weight))
    return out


def card(facts: Mapping[str, Any]) -> str:
    """The README of a run folder, as a model card.

    Args:
        facts: base, task, data, method, config, results (name -> metrics), trained, stored, base_parameters, bytes,
            citation, versions, commands, changes, pictures (files that show what the method found out).
    """
    front = "\n".join(
        [
            "---",
            f"base_model: {json.dumps(facts['base'])}",
            "library_name: inlay",
            f"tags: [inlay, {facts['method_name'].replace('+', ', ')}, {facts['task']}]",
            "---",
        ]
    )
    share = 100 * facts["trained"] / max(facts["base_parameters"], 1)
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in facts["settings"].items())
    commands = "\n".join(facts["commands"])
    changes = "".join(
        f"\n- step {c['step']}: `{c['what']}` was {c['was']!r}, became {c['now']!r}" for c in facts["changes"]
    )
    return f"""{front}
# {facts["title"]}

An adapter for `{facts["base"]}`, trained with [inlay](https://pypi.org/project/inlay) on {facts["data"]}.

{table(facts["results"])}

| | |
|---|---|
| method | `{facts["method"]}` |
| trained parameters | {facts["trained"]:,} ({share:.3f} % of the base) |
| stored parameters | {facts["stored"]:,} ({size(facts["bytes"])}) |
| training | {facts["training"]} |

![loss](loss.png)
{"".join(f"{chr(10)}![{name}]({name})" + chr(10) for name in facts["pictures"])}
## Use

```bash
{commands}
```

```python
{facts["python"]}
```

## Settings

| key | value |
|---|---|
{settings}

Everything else: `config.yaml`; software: {facts["versions"]} (`env.json`).
{"## Changed on resume" + changes if changes else ""}
## Citation

```bibtex
{facts["citation"]}
```
"""


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Results as a Markdown table, one row for each model."""
    columns = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    columns.sort(key=lambda name: name == "loss")  # last: it is not what a reader looks for
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, metrics in results.items():
        cells = (f"{metrics[c]:.4g}" if c in metrics else "" for c in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes as people say them.

    >>> size(2_500_000)
    '2.5 MB'
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
