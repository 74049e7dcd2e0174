"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from inlay.planning.bases import BASES
from inlay.planning.plan import Cost, Plan

GIB = 1 << 30


def gib(count: float) -> str:
    """Bytes in one unit for all that is compared, with about three figures.

    >>> gib(3 << 29), gib(0), gib(124.58 * 2**30)
    ('1.50', '0', '125')
    """
    value = count / GIB
    for least, digits in ((99.5, 0), (9.95, 1), (0.0995, 2)):
        if value >= least:
            return f"{value:.{digits}f}"
    return f"{value:.3f}" if count else "0"


def short(count: float) -> str:
    """Three figures and a unit, for tables that fit 80 columns.

    >>> short(22_713_986), short(8450), short(770)
    ('22.7M', '8.45K', '770')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}" if count < 999.5 * unit else f"{count / unit:.0f}{name}"
    return f"{count:.0f}"


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
    table = Table(box=None, pad_edge=False, header_style="dim", caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    bases = [name for name in BASES if any(c.base == name for c in made.costs)]
    table.caption = "%: of the base; FLOP: each token; time: of full fine-tuning; a column a base: memory in GiB"
    for name in ("trained", "%", "stored", "file", "FLOP", "time", *(BASES[name].title for name in bases)):
        table.add_column(name, justify="right", no_wrap=True)
    for method in dict.fromkeys(c.method for c in made.costs):
        row = {c.base: c for c in made.costs if c.method == method and c.checkpointing == made.checkpointing}
        one = next(iter(row.values()))
        table.add_row(
            _plain(method),
            short(one.trained),
            f"{100 * one.trained / made.parameters:.3g}",
            short(one.stored),
            f"{short(one.file_bytes)}B",
            short(one.flops_per_token),
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
        table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left", padding=(0, 1, 0, 0))
        table.title = f"[bold]on {BASES[base].title}[/], GiB"
        table.caption_justify = "left"
        table.add_column("method", overflow="fold")
        table.add_column("kept?", no_wrap=True)
        hosts = any(c.host_bytes for c in shown)
        for name in ("weights", "grads", "optim", "activ.", "scratch", "peak", *["host"] * hosts):
            table.add_column(name, justify="right", no_wrap=True)
        if made.capacity is not None:
            table.add_column("rows", justify="right", no_wrap=True)
            table.add_column("tokens", justify="right", no_wrap=True)
            table.caption = f"rows: the most of {made.length} tokens that fit; tokens: the most in {made.batch} rows"
        for cost in (c for c in shown if c.base == base):
            memory = cost.memory
            parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.scratch)
            cells = [
                _plain(cost.method),
                "no" if cost.checkpointing else "yes",
                *map(gib, parts),
                _marked(cost),
                *[gib(cost.host_bytes)] * hosts,
            ]
            if made.capacity is not None:
                longest = "" if cost.largest_length is None else f"{cost.largest_length:,}"
                cells += [f"{cost.largest_batch or 0:,}", longest]
            table.add_row(*cells)
        yield table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
