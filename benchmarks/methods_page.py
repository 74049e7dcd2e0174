"""docs/methods.md: what each method can do, read off the tests that show it, and how each is used.

    python benchmarks/methods_page.py --run       # runs the tests marked `proves` (about four minutes), keeps results
    python benchmarks/methods_page.py             # writes the page from the results

A test says what it proves: `@pytest.mark.proves("merge")` for the method in its parameter `name`, or
`@pytest.mark.proves("oracle", "lora")`. Where a method cannot do something, the test holds the refusal to its words and
records them (`record_property("refusal", ...)`), and the page prints them. A cell without a test is an error.
Results stand in `runs/methods-page.json` as soon as they are there; `--run tests/contracts` renews those of a part, and
`--run --missing` goes on where a run was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from inlay.cli.methods import source
from inlay.methods.base import methods
from inlay.train.defaults import TABLE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "methods-page.json"
PAGE = ROOT / "docs" / "methods.md"
TESTS = ["tests/contracts", "tests/methods", "tests/formats"]
KINDS = ("decoder", "encoder", "enc-dec")
COLUMNS = (
    *KINDS, "count", "oracle", "PEFT in/out", "resume", "merge", "compile", "checkpointing", "mixed batch", "generate",
    "bf16", "quantised base",
)  # fmt: skip

USES = {
    "lora": "The first thing to try: near full fine-tuning, merges into the weights, and every tool knows its format.",
    "dora": "Where LoRA at a small rank falls short; it costs a little more time in training and nothing when merged.",
    "adalora": "Where the parameter budget is tight and the run long enough for the schedule; shows which layers matter.",
    "ia3": "Few examples, and thousands of adapters to keep: a few kilobytes each, merged at no cost.",
    "bitfit": "Small changes to encoders that have biases; not for Llama or T5, which have none.",
    "bottleneck": "The classical adapter. Parallel on the feed-forward span is the strongest single form in He et al.",
    "mam": "Generation with a budget of a few percent, where the best quality counts and merging does not.",
    "unipelt": "Few examples, or a task for which nobody knows which method fits: the gates choose.",
    "inlay": "Research: any cell of the table, and any sum of cells. See [design_space.md](design_space.md).",
    "multihead": "A prefix without its competition for attention; for comparisons with prefix tuning.",
    "prefix": "Generation with few parameters, many tasks on one resident model. It wants a high learning rate.",
    "prompt": "Very large models, where a few virtual tokens are enough, and one batch serves many tasks.",
    "ptuning": "Templates with virtual tokens between words, a verbalizer in place of a head, few examples.",
    "ptuningv2": "Classification and tagging with deep prompts; short ones for simple classes, about 100 for tagging.",
    "diffpruning": "A sparse difference to store, where training may cost more than full fine-tuning.",
    "full": "The yardstick: all parameters, ten times smaller learning rates, an adapter as large as the model.",
    "headonly": "The floor: what the frozen features give. A method that does not beat it has learnt nothing.",
}
EXAMPLES = {
    "lora": "LoRA(rank=16, alpha=32, sites=\"linear\")",
    "dora": "DoRA(rank=8)",
    "adalora": "AdaLoRA(init_rank=12, target_rank=8)",
    "ia3": "IA3()",
    "bitfit": "BitFit(sites=(\"attn.q\", \"ffn.up\"))",
    "bottleneck": "Bottleneck.houlsby(64)",
    "mam": "MAM(length=16, size=16, scale=2.0)",
    "unipelt": "UniPELT(rank=8, length=10, reduction=16)",
    "inlay": "Inlay(form=\"low_rank\", size=8, sites=\"ffn\", composition=\"gated\")",
    "multihead": "MultiHead(length=30)",
    "prefix": "Prefix(length=10, mid=512)",
    "prompt": "Prompt.from_text(tokenizer, \"Classify the sentiment of this review:\")",
    "ptuning": "PTuning.from_template(tokenizer, \"{prompt:3} {text} {prompt:3} [MASK]\")",
    "ptuningv2": "PTuningV2(length=20)",
    "diffpruning": "DiffPruning(penalty=1.25e-7)",
    "full": "Full()",
    "headonly": "HeadOnly()",
}  # fmt: skip


class Collector:
    """A pytest plugin that keeps the outcome of every test that says what it proves."""

    def __init__(self, known: dict[str, dict[str, Any]], *, missing: bool) -> None:
        self.results, self.missing, self.since = known, missing, 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        marked = {item.nodeid for item in items if item.get_closest_marker("proves")}
        gone = [
            k
            for k in self.results
            if k not in marked and k.partition("::")[0] in {m.partition("::")[0] for m in marked}
        ]
        for key in gone:
            del self.results[key]
        done = {k for k, result in self.results.items() if self.missing and result["outcome"] == "passed"}
        chosen = [item for item in items if item.get_closest_marker("proves") and item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        for item in items:
            parameters = getattr(item, "callspec", None)
            given = parameters.params if parameters else {}
            proofs = []
            for mark in item.iter_markers("proves"):
                column, *named = mark.args
                proofs += [[column, method] for method in named or [given["name"]]]
            self.results[item.nodeid] = {"proofs": proofs, "family": given.get("family"), "outcome": "none"}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.results.get(report.nodeid)
        if result is None or (report.when != "call" and report.passed):
            return
        result["outcome"] = report.outcome
        result["refusal"] = dict(report.user_properties).get("refusal")
        self.since += 1
        if self.since % 20 == 0:
            self.keep()

    def keep(self) -> None:
        """Writes what is known."""
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(self.results, indent=1))


def run(paths: list[str], *, missing: bool) -> int:
    """Runs the marked tests of some paths and renews their results, or adds those that are missing."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not missing:
        known = {k: v for k, v in known.items() if not any(k.startswith(path) for path in paths)}
    # This folder has a methods.py as well, which must not stand in for tests/methods.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    collector = Collector(known, missing=missing)
    code = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *paths], plugins=[collector])
    collector.keep()
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else int(code)


def kind_of(family: str) -> str:
    """The column of a family."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    from contracts.cases import DECODERS, ENCODERS

    return "decoder" if family in DECODERS else "encoder" if family in ENCODERS else "enc-dec"


def cells(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(method, column) -> the results that speak of it."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results.values():
        for column, method in result["proofs"]:
            where = kind_of(result["family"]) if column == "family" else column
            found.setdefault((method, where), []).append(result)
    return found


class Notes:
    """Reasons, numbered in the order in which the table names them, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def reason(refusal: str) -> str:
    """A refusal without what is particular to the tiny model of the test: each rule once, no module paths."""
    first, *rest = refusal.split("\n")
    lines = [re.sub(r":(?: (?:\w+\.)+\w+ \(\w+\),?)+$", "", line.strip()) for line in rest]
    lines = [re.sub(r"(?:\w+\.){2,}(\w+)", r"\1", line) for line in lines]
    text = re.sub(r"adapter '\w+'", "the adapter", first)
    text = re.sub(
        r"^(?:\w+\.){2,}(\w+) is", r"\1 is", re.sub(r"\(\w+=.*?\)(?= by itself)|\(\)(?= by itself)", "", text)
    )
    text = re.sub(r"\b\w+For\w+|\b\w+LMHeadModel", "the model", text)
    own = [line for line in dict.fromkeys(lines) if line != "Keep it attached."]
    return " ".join([text, *("; ".join(own),)]).strip()


def cell(method: str, column: str, found: list[dict[str, Any]], notes: Notes) -> str:
    """yes, or no with the number of the reason, or yes with the families that refuse."""
    if not found:
        if column == "generate":
            return "no head for texts" if method == "headonly" else ""
        raise SystemExit(f"no test says anything of {method} and {column}; write one, or run the tests with --run")
    if any(r["outcome"] == "failed" for r in found):
        return "**fails**"
    if any(r["outcome"] != "passed" for r in found):
        return "not run"
    refused = [r for r in found if r.get("refusal")]
    if not refused:
        return "yes"
    numbers = sorted({notes.number(reason(r["refusal"])) for r in refused})
    marks = ", ".join(f"[{n}](#reasons)" for n in numbers)
    families = sorted({r["family"] for r in refused if r["family"]})
    whole = {r["family"] for r in found} == set(families) or not families
    return f"no {marks}" if whole else f"yes, not {', '.join(families)} {marks}"


def section(key: str) -> list[str]:
    """What a method is, where it comes from, how it is written, what it starts from, when to use it."""
    cls = methods()[key]
    text = (inspect.getdoc(cls) or "").partition("Attributes:")[0].strip()
    settings = ", ".join(
        f"{name}={field.get_default(call_default_factory=True)!r}" for name, field in cls.model_fields.items()
    )
    rates = TABLE[key]
    starts = "; ".join(
        f"{kind}: learning rate {d.learning_rate:g}, batch {d.batch}, warm-up {d.warmup_ratio:g}, weight decay "
        f"{d.weight_decay:g}"
        for kind, d in rates.items()
    )
    return [
        f"## {cls.__name__}",
        "",
        f"{USES[key]}",
        "",
        re.sub(r"^\* ", "- ", text, flags=re.M),
        "",
        f"*Source*: {source(cls.citation)}; BibTeX by `inlay.citation`. *Settings and defaults*: `{cls.__name__}({settings})`; "
        f"`inlay methods {key}` explains them. *Training starts from* (`src/inlay/train/defaults.py` says whence, and how rates go with width): {starts}.",
        "",
        "```python",
        f"adapter = inlay.attach(model, inlay.{EXAMPLES[key]})",
        "```",
        "",
        f"`inlay train --model MODEL --data rows.csv --method {key}`",
        "",
    ]


def page(results: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    found, notes = cells(results), Notes()
    passed = sum(r["outcome"] == "passed" for r in results.values())
    known = methods()
    lines = [
        "# Methods",
        "",
        f"Written by `python benchmarks/methods_page.py` on {datetime.date.today().isoformat()} from {passed:,} passed of "
        f"{len(results):,} tests (`--run` runs them); nothing in the matrix is typed by hand. `inlay methods` lists the "
        "same methods in a terminal. How well each trains with its defaults: the dated tables in "
        "[benchmarks/](../benchmarks/), written by `python benchmarks/methods.py`.",
        "",
        "A *yes* for a kind of model means: on each of its families (Llama, Qwen 2, GPT-2, OPT; BERT, RoBERTa, ModernBERT; "
        "T5, BART) base keys are unchanged, gradients reach the adapter alone, the output at the start is unchanged bit for "
        "bit where promised, saving and loading gives the same bits, copies are sound, and detaching restores all. *Count*: "
        "published parameter counts as exact integers. *Oracle*: values and gradients of a dense form written out in the "
        "test, or of PEFT. *PEFT in/out*: folders of PEFT load with equal logits, and ours load there. *Resume*: from its "
        "own folder, the same bits as without the interruption. *Merge*: equal to 1e-5, and unmerging restores every bit.",
        "",
        "| method | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for key, cls in known.items():
        row = [cell(key, column, found.get((key, column), []), notes) for column in COLUMNS]
        lines.append(f"| [{cls.__name__}](#{cls.__name__.lower()}) | " + " | ".join(row) + " |")
    lines += ["", "### Reasons", "", *(f"{n}. {text}" for n, text in enumerate(notes.texts, 1)), ""]
    order = sorted(known, key=lambda key: list(USES).index(key))
    for key in order:
        lines += section(key)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="PATH", help="run the tests of these paths; of all without a path")
    parser.add_argument("--missing", action="store_true", help="with --run: only tests that have not passed yet")
    arguments = parser.parse_args()
    if arguments.run is not None and (code := run(arguments.run or TESTS, missing=arguments.missing)):
        raise SystemExit(f"pytest ended with {code}; the page is not written")
    if not RESULTS.exists():
        raise SystemExit("there are no results yet: python benchmarks/methods_page.py --run")
    PAGE.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
