"""The whole comparison: every cell once, what is finished is kept, and the report over what there is."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from inlay.compare import cell as cells
from inlay.compare.cell import Record
from inlay.compare.heldout import fixed_data
from inlay.compare.plan import Cell, Plan
from inlay.compare.table import Row, markdown, rows_of, with_spread
from inlay.errors import ConfigError
from inlay.folders import read_json, replace_text
from inlay.train.progress import clock

MARK = "comparison.json"


@dataclass
class Comparison:
    """A finished comparison."""

    plan: Plan
    records: list[Record]
    seconds: float

    @property
    def rows(self) -> list[Row]:
        """One row for each method, best first."""
        return rows_of(self.records)


def compare(plan: Plan, *, console: Console | None = None, quiet: bool = False) -> Comparison:
    """Run what is not finished yet, and write `report.html`, `report.md` and `quality.png` into the plan's folder.

    Args:
        plan: what to compare.
        console: where to tell of progress.
        quiet: print nothing.

    Raises:
        ConfigError: the folder holds another comparison.
        Interrupted: a signal came; what is finished is kept, the run in progress has its checkpoint.
    """
    from inlay.compare.together import train_together

    told = Console(quiet=True) if quiet else console or Console()
    _claim(plan)
    data = fixed_data(plan)
    todo = list(plan.cells())
    known = {cell.name: cells.read(plan, cell, data) for cell in todo}
    open_cells = [cell for cell in todo if known[cell.name] is None]
    kept = len(todo) - len(open_cells)
    steps = plan.template.max_steps
    told.print(
        f"[bold]{len(plan.variants)} methods[/], {len(plan.seeds)} seeds, {len(plan.sizes)} sizes of data: "
        f"{len(todo)} runs"
        + (f" of {steps:,} steps" if steps > 0 else "")
        + (f", {kept} of them finished before" if kept else ""),
        highlight=False,
    )
    bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=told, transient=True)
    task = bar.add_task("", total=len(open_cells))
    began = time.monotonic()
    try:
        with bar:
            for number, cell in enumerate(open_cells):
                spent = time.monotonic() - began
                left = f"  ETA {clock(spent / number * (len(open_cells) - number))}" if number else ""
                bar.update(task, completed=number, description=f"{_name(cell)}{left}")
                start = time.monotonic()
                if plan.together and (number == 0 or not cell.alike(open_cells[number - 1])):
                    train_together(plan, [other for other in open_cells[number:] if other.alike(cell)], data)
                known[cell.name] = record = cells.run(plan, cell, data)
                _tell(told, f"{kept + number + 1}/{len(todo)}", cell, record, time.monotonic() - start)
    finally:
        seconds = _spent(plan, time.monotonic() - began)
    comparison = Comparison(plan, [record for record in known.values() if record is not None], seconds)
    _write(comparison)
    return comparison


def _claim(plan: Plan) -> None:
    """Make the folder this comparison's own, or find that it is another's.

    Methods, seeds and sizes may change from one call to the next; model, data and settings may not.
    """
    wanted = {"settings": cells.comparable(plan.template)}
    path = plan.output / MARK
    if path.exists():
        changes = cells.differences(read_json(path)["settings"], plan.template)
        if changes:
            raise ConfigError(f"output_dir: {plan.output} holds another comparison ({changes}); name another folder")
        return
    if plan.output.exists() and (not plan.output.is_dir() or any(plan.output.iterdir())):
        raise ConfigError(f"output_dir: {plan.output} is not empty and holds no comparison; name another folder")
    plan.output.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({**wanted, "seconds": 0.0}, indent=1))


def _spent(plan: Plan, seconds: float) -> float:
    """Seconds of all calls together."""
    path = plan.output / MARK
    kept = read_json(path)
    kept["seconds"] = kept.get("seconds", 0.0) + seconds
    replace_text(path, json.dumps(kept, indent=1))
    return float(kept["seconds"])


def _name(cell: Cell) -> str:
    return f"{cell.variant.label}, {cell.size or 'all'} rows, seed {cell.seed}"


def _tell(console: Console, number: str, cell: Cell, record: Record, seconds: float) -> None:
    from inlay.train.narrate import escape

    if record.error:
        result = f"[yellow]not possible:[/] {escape(record.error)}"
    else:
        result = (
            f"{record.metric} [bold]{with_spread(record.value, None)}[/], {record.trained:,} trained, {seconds:.0f} s"
        )
    console.print(f"{number:>7}  {escape(_name(cell))}: {result}", highlight=False, soft_wrap=True)


def _write(comparison: Comparison) -> None:
    from inlay.compare.figures import picture
    from inlay.compare.page import page

    folder, rows = comparison.plan.output, comparison.rows
    facts = facts_of(comparison)
    replace_text(folder / "report.md", f"# {facts['title']}\n\n{facts['what']}\n\n{markdown(rows)}")
    replace_text(folder / "report.html", page(comparison, facts))
    if any(not row.error for row in rows):
        picture(rows, folder / "quality.png")


def facts_of(comparison: Comparison) -> dict[str, Any]:
    """What stands above the table: model, data, machine, settings."""
    template = comparison.plan.template
    data = template.data if isinstance(template.data, str) else ", ".join(template.data)
    shown = "Python's docstrings" if data == "demo" else Path(data).name or data
    record = next((r for r in comparison.records if not r.error), None)
    facts: dict[str, Any] = {"title": f"Fine-tuning {Path(template.model).name} on {shown}", "what": ""}
    if record is None:
        return facts
    env = record.environment
    whole = next((r for r in comparison.records if not r.error and r.size is None), record)
    seeds = len(comparison.plan.seeds)
    where = (
        ", ".join(env["accelerators"]) or f"{env['processor']}, {env['threads']} thread{'s' * (env['threads'] != 1)}"
    )
    facts["what"] = (
        f"{whole.task}, {whole.rows:,} rows to train on and {whole.held_out:,} held out; {whole.steps:,} steps of "
        f"{whole.batch} rows, {seeds} seed{'s' * (seeds != 1)}; {env['precision']} on {where}; torch {env['torch']}, "
        f"inlay {env['inlay']}. All runs together took {clock(comparison.seconds)}."
    )
    return facts
