"""The report of `run.py`: targets, tables, and the plot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import MIB
from variants import METHODS, NAMES, SIZES

Line = dict[str, Any]


def find(lines: list[Line], **wanted: Any) -> Line | None:
    """The finished cell with exactly these settings beside its script and repeats."""
    for line in lines:
        if {k: v for k, v in line["cell"].items() if k not in ("script", "repeats")} == wanted:
            return line
    return None


def step(line: Line, variant: str, part: str = "step") -> float:
    """Median milliseconds."""
    return float(line["variants"][variant][part]["median"])


def best_peft(line: Line) -> float:
    """PEFT at its best in one cell."""
    return min(step(line, name) for name in ("peft", "peft best"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def ms(row: dict[str, float]) -> str:
    """Median and quartiles."""
    digits = 1 if row["median"] < 1000 else 0
    return f"{row['median']:.{digits}f} ({row['low']:.{digits}f}–{row['high']:.{digits}f})"


def steps_table(line: Line) -> str:
    """All variants of one cell."""
    peft = step(line, "peft") if "peft" in line["variants"] else None
    bound = line["limit"]["frozen"] + line["limit"]["factors"]
    rows = []
    for name in NAMES:
        if name not in line["variants"]:
            continue
        v = line["variants"][name]
        own = step(line, name)
        reached = line["limit"]["frozen"] if name == "frozen" else bound
        rows.append(
            [
                name,
                ms(v["step"]),
                *(f"{v[part]['median']:.1f}" for part in ("forward", "backward", "optimizer")),
                f"{line['tokens'] / own * 1e3:.0f}",
                f"{own / peft:.2f}" if peft else "",
                "" if name == "full" else f"{100 * reached / own:.0f} %",
                f"{v['saved'] / MIB:.1f}",
            ]
        )
    head = [
        "variant",
        "step, ms",
        "forward",
        "backward",
        "optimizer",
        "tokens/s",
        "× PEFT",
        "of the limit",
        "kept, MiB",
    ]
    return table(head, rows)


def methods_table(lines: list[Line], size: str, dtype: str) -> str:
    """One row a method: inlay beside PEFT and the frozen model."""
    rows = []
    for method in METHODS:
        line = find(lines, method=method, size=size, dtype=dtype)
        if line is None:
            continue
        v, own = line["variants"], step(line, "inlay")
        pair = "peft" in v
        rows.append(
            [
                method,
                str(v["inlay"]["trained"]),
                ms(v["inlay"]["step"]),
                ms(v["peft"]["step"]) if pair else "none",
                f"{own / step(line, 'peft'):.2f}" if pair else "",
                f"{own / best_peft(line):.2f}" if pair else "",
                f"{own / step(line, 'frozen'):.2f}",
                f"{own / step(line, 'full'):.2f}" if "full" in v else "",
                f"{v['inlay']['saved'] / MIB:.1f}",
                f"{v['peft']['saved'] / MIB:.1f}" if pair else "",
            ]
        )
    head = [
        "method",
        "trained",
        "inlay, ms",
        "PEFT, ms",
        "× PEFT",
        "× its best",
        "× frozen",
        "× full",
        "kept, MiB",
        "PEFT's",
    ]
    return table(head, rows) if rows else ""


def targets(lines: list[Line]) -> str:
    """What was aimed for, and what came out."""
    rows: list[list[str]] = []

    def row(aim: str, bound: float, value: Callable[[], float | None], unit: str = "") -> None:
        got = value()
        if got is not None:
            rows.append(
                [
                    aim,
                    f"≤ {bound:g}{unit}",
                    f"{got:.2f}{unit}" if got < 20 else f"{got:.0f}{unit}",
                    "yes" if got <= bound else "**no**",
                ]
            )

    def cell(method: str, dtype: str, **more: Any) -> Line | None:
        return find(lines, method=method, size="large", dtype=dtype, **more)

    def ratio(line: Line | None, over: Callable[[Line], float]) -> float | None:
        return None if line is None else step(line, "inlay") / over(line)

    def saved(line: Line | None) -> float | None:
        return None if line is None else line["variants"]["inlay"]["saved"] / line["variants"]["peft"]["saved"]

    def handled(what: str) -> float | None:
        line = find(lines, what="handling")
        return None if line is None else float(line["ms"][what]["median"])

    for name in ("float32", "bfloat16"):
        short = name.replace("float32", "fp32").replace("bfloat16", "bf16")
        lora = cell("lora", name)
        row(
            f"LoRA {short} step / PEFT as it comes",
            0.55 if short == "fp32" else 0.7,
            lambda lora=lora: ratio(lora, lambda c: step(c, "peft")),
        )
        if short == "fp32":
            row(f"LoRA {short} step / PEFT at its best", 0.95, lambda lora=lora: ratio(lora, best_peft))
        else:
            row(f"LoRA {short} step / full fine-tuning", 1.0, lambda lora=lora: ratio(lora, lambda c: step(c, "full")))
        row(
            f"LoRA {short} step / limit",
            1.1,
            lambda lora=lora: ratio(lora, lambda c: c["limit"]["frozen"] + c["limit"]["factors"]),
        )
        if short == "bf16":
            row(f"LoRA {short}: kept for backward / PEFT", 0.65, lambda lora=lora: saved(lora))
        dropped = cell("lora", name, dropout=0.05)
        row(f"LoRA {short} with dropout: kept / PEFT", 0.65, lambda dropped=dropped: saved(dropped))
        qlora, kept = cell("qlora", name), cell("qlora", name, pages="kept")
        row(
            f"QLoRA {short} step / PEFT + bitsandbytes",
            0.5,
            lambda qlora=qlora: ratio(qlora, lambda c: step(c, "peft")),
        )
        row(f"QLoRA {short} step / PEFT + bitsandbytes, pages kept", 0.85, lambda kept=kept: ratio(kept, best_peft))
        dora = cell("dora", name)
        row(
            f"DoRA {short} step / our LoRA",
            1.1,
            lambda dora=dora: ratio(dora, lambda c: step(c, "inlay LoRA")),
        )
    row("LoRA on one projection, one row: added", 12, lambda: one_row(lines, "inlay LoRA"), " µs")
    row("attach to 168 projections, anatomy known", 40, lambda: handled("inlay: attach adapter 2"), " ms")
    row("attach to 168 projections, first time", 400, lambda: handled("inlay: attach, anatomy unknown"), " ms")
    row("save with fsync", 73, lambda: handled("inlay: save, with fsync"), " ms")
    return table(["aim", "at most", "measured", "met"], rows)


def one_row(lines: list[Line], name: str) -> float | None:
    """Microseconds that one variant adds to a projection."""
    line = find(lines, what="one row")
    return None if line is None else float(line["us"][name]["median"])


def text(lines: list[Line], missing: list[dict[str, Any]], plot: str | None) -> str:
    """The whole report."""
    about = lines[-1]["machine"]
    loads = [line["load"] for line in lines if "load" in line]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"# inlay beside PEFT, {about['date']}\n",
        f"{about['processor']}, {about['cores']} cores; {versions}. Threads of torch: "
        f"{sorted({line['threads'] for line in lines if 'threads' in line})}. Load average while measuring: "
        f"{min(loads):.1f} to {max(loads):.1f}. Written by `python benchmarks/run.py`.\n",
        "Every figure is a median, quartiles in brackets; with one thread, steps are in processor time. The variants of a table took turns in one process, with the same "
        "model, data, seed, dtype, targets, rank and optimizer. `frozen`: forward, and backward through the frozen model; "
        "`full`: all weights trained; `peft best`: adapters in the dtype of the base, and torch's switch of fp32 products "
        "to oneDNN where that stays exact. The limit is the sum of all matrix products of a step at the best rate measured "
        "for each shape (`benchmarks/limit.py`). Kept: bytes that autograd holds between forward and backward.\n",
    ]
    if missing:
        parts.append(f"Not measured in this run: {len(missing)} of the cells.\n")
    if plot:
        parts.append(f"![step times]({plot})\n")
    aims = targets(lines)
    if aims.count("\n") > 2:
        parts += ["## What was aimed for\n", aims]
    parts.append("## LoRA\n")
    for line in lines:
        c = line["cell"]
        if c.get("method") not in ("lora", "qlora") or "only" in c:
            continue
        s = SIZES[c["size"]]
        title = f"{c['method'].replace('lora', 'LoRA').replace('q', 'Q')}, {c['size']}, {c['dtype']}"
        title += "".join(f", {k} {v}" for k, v in c.items() if k in ("dropout", "pages"))
        shape = f"{s.layers} layers of {s.hidden} and {s.ffn}, {s.rows} × {s.length} tokens"
        parts += [
            f"### {title}\n",
            f"{shape}; {line['limit']['gflops']:.0f} GFLOP/s at the limit.\n",
            steps_table(line),
        ]
    parts.append("## All methods\n")
    for size, dtype in (("large", "bfloat16"), ("large", "float32"), ("small", "float32"), ("small", "bfloat16")):
        found = methods_table(lines, size, dtype)
        if found.count("\n") > 4:
            parts += [f"### {size}, {dtype}\n", found]
    parts += memory(lines) + once(lines)
    return "\n".join(parts)


def memory(lines: list[Line]) -> list[str]:
    """Peak memory of each variant alone in a process."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name in NAMES:
            line = find(lines, method="lora", size="large", dtype=dtype, only=name)
            if line is not None:
                rows.append([dtype, name, f"{line['made'] / MIB:.0f}", f"{line['peak'] / MIB:.0f}"])
    head = ["dtype", "variant", "model made, MiB", "after three steps, MiB"]
    title = "## Peak memory (LoRA, large), above what the process had with a tiny model\n"
    return [title, table(head, rows)] if rows else []


def once(lines: list[Line]) -> list[str]:
    """What is paid once."""
    parts = []
    handling = find(lines, what="handling")
    if handling is not None:
        rows = [
            [what, ms(row)] for what, row in sorted(handling["ms"].items(), key=lambda item: item[0].split(": ")[1])
        ]
        parts += ["## Once, on a Llama with 168 projections\n", table(["what", "ms"], rows)]
    row = find(lines, what="one row")
    if row is not None:
        rows = [[name, ms(added)] for name, added in row["us"].items()]
        title = f"## Added to one projection for one row, µs (the projection itself takes {row['base']:.1f})\n"
        parts += [title, table(["adapter", "µs"], rows)]
    imported = find(lines, what="imports")
    if imported is not None:
        rows = [[what, ms(value)] for what, value in imported["ms"].items()]
        parts += ["## A fresh process\n", table(["what", "ms"], rows)]
    return parts


def draw(lines: list[Line], path: Path) -> bool:
    """Step times as multiples of PEFT's as it comes: LoRA by size, and all methods at one size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = ["frozen", "full", "inlay", "peft", "peft best"]
    colours = dict(zip(shown, ("#9aa5b1", "#c98f5a", "#1f6feb", "#b0413e", "#d98880"), strict=True))
    loras = [
        line
        for size in SIZES
        for dtype in ("float32", "bfloat16")
        if (line := find(lines, method="lora", size=size, dtype=dtype)) is not None
    ]
    dtype = "bfloat16" if find(lines, method="dora", size="large", dtype="bfloat16") else "float32"
    size = "large" if dtype == "bfloat16" else "small"
    others = [line for m in METHODS if (line := find(lines, method=m, size=size, dtype=dtype)) is not None]
    if not loras:
        return False
    figure, axes = plt.subplots(2, 1, figsize=(9, 8), constrained_layout=True)
    for axis, group, label in (
        (axes[0], loras, lambda c: f"{c['size']}\n{c['dtype'].replace('float32', 'fp32').replace('bfloat16', 'bf16')}"),
        (axes[1], others, lambda c: c["method"]),
    ):
        width = 0.16
        for i, line in enumerate(group):
            reference = step(line, "peft") if "peft" in line["variants"] else step(line, "full")
            for j, name in enumerate(shown):
                if name in line["variants"]:
                    axis.bar(i + (j - 2) * width, step(line, name) / reference, width * 0.92, color=colours[name])
            bound = (line["limit"]["frozen"] + line["limit"]["factors"]) / reference
            axis.plot([i - 2.5 * width, i + 2.5 * width], [bound, bound], color="black", lw=1.2)
        axis.set_xticks(range(len(group)), [label(line["cell"]) for line in group])
        axis.axhline(1, color="#b0413e", lw=0.6, ls=":")
        axis.set_ylabel("step time / PEFT's as it comes")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, min(axis.get_ylim()[1], 2.5))
    axes[0].set_title("LoRA of rank 16 on all projections, by size and dtype", loc="left", fontsize=10)
    axes[1].set_title(
        f"All methods, {size}, {dtype} (where PEFT has none: beside full fine-tuning)", loc="left", fontsize=10
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in shown]
    handles.append(plt.Line2D([], [], color="black", lw=1.2))
    figure.legend(handles, [*shown, "limit"], ncol=6, loc="outside upper center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def write(lines: list[Line], missing: list[dict[str, Any]], folder: Path, name: str | None) -> Path:
    """The report and its plot; the path of the report."""
    about = lines[-1]["machine"]
    slug = name or re.sub(r"[^a-z0-9]+", "-", about["processor"].split("(avx")[0].lower()).strip("-")
    stem = f"{about['date']}-{slug}-{about['cores']}-cores"
    plot = folder / f"{stem}.png"
    path = folder / f"{stem}.md"
    path.write_text(text(lines, missing, plot.name if draw(lines, plot) else None))
    return path
