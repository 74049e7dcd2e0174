"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from inlay.planning.bases import BASES
from inlay.planning.plan import Cost, Plan

GIB = 1 << 30


def gib(count: float) -> str:
    """Bytes in one unit for all that is compared.

    >>> gib(3 << 29)
    '1.50'
    """
    value = count / GIB
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _flops(count: float) -> str:
    return f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M"


def tables(made: Plan) -> Iterator[RenderableType]:
    """The overview of methods and bases, the split of the memory, what was refused, and what the figures mean."""
    yield _title(made)
    yield _overview(made)
    yield from _splits(made)
    for name, reason in made.refused.items():
        yield f"[yellow]{name}[/] is left out: {_plain(reason)}"
    yield (
        "[dim]Memory is that of tensors at the moment when a step needs most; step time is by arithmetic "
        "(FLOPs over those of full fine-tuning), not measured. docs/plan.md[/]"
    )


def _title(made: Plan) -> str:
    memory = "" if made.capacity is None else f", on {gib(made.capacity)} GiB"
    kept = "activations computed again" if made.checkpointing else "activations kept"
    return (
        f"[bold]{_plain(made.model)}[/]: {made.parameters:,} parameters, {made.task}; {made.batch} x {made.length} "
        f"tokens a step{memory}, {kept}, {made.optim} ({made.device})"
    )


def _overview(made: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("method")
    bases = [name for name in BASES if any(c.base == name for c in made.costs)]
    titles = [f"{BASES[name].title} GiB" for name in bases]
    for name in ("trained", "% of base", "stored", "file", "FLOPs/token", "time/full", *titles):
        table.add_column(name, justify="right")
    for method in dict.fromkeys(c.method for c in made.costs):
        row = {c.base: c for c in made.costs if c.method == method and c.checkpointing == made.checkpointing}
        one = next(iter(row.values()))
        table.add_row(
            _plain(method),
            f"{one.trained:,}",
            f"{100 * one.trained / made.parameters:.3g}",
            f"{one.stored:,}",
            f"{one.file_bytes / (1 << 20):.1f} MiB",
            _flops(one.flops_per_token),
            f"{one.step_vs_full:.2f}",
            *(_marked(row[name]) if name in row else "-" for name in bases),
        )
    return table


def _marked(cost: Cost) -> str:
    """The peak, green where it fits and red where it does not."""
    if cost.fits is None:
        return gib(cost.peak)
    return f"[green]{gib(cost.peak)}[/]" if cost.fits else f"[red]{gib(cost.peak)} ✗[/]"


def _splits(made: Plan) -> Iterator[RenderableType]:
    """For what was worked out with and without checkpointing: where the memory goes."""
    both = {(c.method, c.base) for c in made.costs if c.checkpointing != made.checkpointing}
    shown = [c for c in made.costs if (c.method, c.base) in both]
    for base in dict.fromkeys(c.base for c in shown):
        table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
        table.title = f"[bold]on {BASES[base].title}[/], GiB"
        table.add_column("method")
        table.add_column("activations")
        for name in ("weights", "gradients", "optimizer", "activations", "scratch", "peak", "on the host"):
            table.add_column(name, justify="right")
        if made.capacity is not None:
            table.add_column(f"rows of {made.length}", justify="right")
            table.add_column(f"tokens of {made.batch} rows", justify="right")
        hosts = any(c.host_bytes for c in shown)
        table.columns[8].header = "on the host" if hosts else ""
        for cost in (c for c in shown if c.base == base):
            memory = cost.memory
            parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.scratch)
            cells = [
                _plain(cost.method),
                "again" if cost.checkpointing else "kept",
                *map(gib, parts),
                _marked(cost),
                gib(cost.host_bytes) if hosts else "",
            ]
            if made.capacity is not None:
                longest = "" if cost.largest_length is None else f"{cost.largest_length:,}"
                cells += [f"{cost.largest_batch or 0:,}", longest]
            table.add_row(*cells)
        yield table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
