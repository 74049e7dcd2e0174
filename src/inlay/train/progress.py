"""What a user sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from inlay.train.metrics import shown


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`.

    >>> clock(3725)
    '1:02:05'
    """
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Shows steps, evaluations and notes of one run. Use as a context around the loop."""

    def __init__(self, console: Console, total_steps: int, *, quiet: bool = False) -> None:
        self.console = console
        self.total = total_steps
        self.quiet = quiet
        self.live = console.is_terminal and not quiet
        self._bar = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True)
        self._task = self._bar.add_task("", total=total_steps)

    def __enter__(self) -> Display:
        if self.live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live:
            self._bar.stop()

    def step(self, record: dict[str, Any], *, logged: bool) -> None:
        """One optimizer step; off a terminal only the logged ones are printed."""
        if not self.live and (self.quiet or not logged):
            return
        line = (
            f"step {record['step']}/{self.total}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tok/s  ETA {clock(record['eta'])}"
        )
        if self.live:
            self._bar.update(self._task, completed=record["step"], description=line)
        else:
            self.console.print(line, highlight=False, soft_wrap=True)

    def busy(self, what: str) -> None:
        """Say on the live line what else the run is doing."""
        if self.live:
            self._bar.update(self._task, description=what)

    def evaluation(self, step: int, metrics: dict[str, float], *, best: bool, name: str = "") -> None:
        """One evaluation on the held-out rows."""
        mark = "  [green]best so far[/]" if best else ""
        title = f"held-out{f' {name}' if name else ''} at step {step}"
        self.note(f"[bold]{title}[/]  {shown(metrics)}{mark}")

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)
