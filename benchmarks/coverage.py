"""Attaches every method to every architecture of the installed transformers and writes docs/coverage.md.

    make coverage                                    # all text architectures
    make coverage ARGS="--only LlamaConfig T5Config"
    make coverage ARGS="--methods lora prefix --resume"
    make coverage ARGS="--other"                     # vision and speech, reported apart in benchmarks/

For each configuration class a tiny random model is built (see zoo.py). Each method must then: leave the output as it was
where the method promises that; give every adapter tensor a gradient; change the output with one optimizer step; give
equal outputs after saving, removing and loading; and be removed without a trace. Each class runs in a process of its
own, so that a crash or a hang costs one class.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import multiprocessing
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.models.llama.modeling_llama
import zoo
from torch import Tensor, nn

import inlay
import inlay.adapter  # loaded before the processes fork, so that none of them loads it again
import inlay.formats.native
import inlay.hosts.attention
import inlay.hosts.softmax
from inlay.errors import InlayError
from inlay.methods.base import Method, methods

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "coverage.jsonl"
REPORT = ROOT / "docs" / "coverage.md"

SETTINGS: dict[str, Callable[[], Method]] = {
    "lora": lambda: inlay.LoRA(rank=2),
    "dora": lambda: inlay.DoRA(rank=2),
    "adalora": lambda: inlay.AdaLoRA(target_rank=2, init_rank=3, total_steps=100),
    "ia3": lambda: inlay.IA3(),
    "bitfit": lambda: inlay.BitFit(add_missing=True),
    "diffpruning": lambda: inlay.DiffPruning(),
    "bottleneck": lambda: inlay.Bottleneck(size=4),
    "bottleneck.houlsby": lambda: inlay.Bottleneck.houlsby(size=4),
    "bottleneck.pfeiffer": lambda: inlay.Bottleneck.pfeiffer(size=4),
    "bottleneck.scaled_parallel": lambda: inlay.Bottleneck.scaled_parallel(size=4),
    "inlay": lambda: inlay.Inlay(form="low_rank", size=2, sites="linear"),
    "full": lambda: inlay.Full(),
    "headonly": lambda: inlay.HeadOnly(),
    "prompt": lambda: inlay.Prompt(length=3),
    "ptuning": lambda: inlay.PTuning(template="{prompt:3} {text}", hidden=8),
    "prefix": lambda: inlay.Prefix(length=3),
    "ptuningv2": lambda: inlay.PTuningV2(length=3, dropout=0.0),
    "multihead": lambda: inlay.MultiHead(length=3),
    "mam": lambda: inlay.MAM(length=3, mid=8, size=4),
    "unipelt": lambda: inlay.UniPELT(rank=2, length=3, mid=8),
}
KEYS = ("prefix", "ptuningv2", "multihead", "mam", "unipelt")
"""Methods that put keys and values, or something else, into attentions."""
PROMPTS = ("prompt", "ptuning")
HEADED = ("headonly",)
"""Methods that only mean something on a model with a task head."""
UNCHANGED = (
    "lora", "dora", "adalora", "ia3", "bitfit", "diffpruning", "bottleneck", "bottleneck.scaled_parallel", "inlay", "full", "headonly",
)  # fmt: skip
"""Methods that promise to leave the output as it is until they are trained."""


@dataclasses.dataclass
class Result:
    """What came of one configuration class."""

    name: str
    model: str = ""
    kind: str = ""
    problem: str = ""
    attention: str = ""
    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


class Failed(Exception):
    """A check that a method did not pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="configuration classes, e.g. LlamaConfig")
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=list(SETTINGS))
    parser.add_argument("--other", action="store_true", help="vision and speech instead of text")
    parser.add_argument("--resume", action="store_true", help="keep the results of an interrupted sweep")
    parser.add_argument("--minutes", type=float, help="stop after that many; --resume goes on")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=180, help="seconds for one class")
    options = parser.parse_args()
    missing = set(methods()) - {name.partition(".")[0] for name in SETTINGS}
    if missing:
        sys.exit(f"benchmarks/coverage.py has no settings for {', '.join(sorted(missing))}")
    kinds = zoo.OTHER if options.other else zoo.TEXT
    chosen = options.methods or list(SETTINGS)
    names = options.only or list(zoo.classes(kinds))
    state = STATE.with_stem(STATE.stem + ("-other" if options.other else ""))
    done = _read(state, chosen) if options.resume else {}
    results = {n: done[n] for n in names if n in done}
    partial = bool(options.only or options.methods)
    state.parent.mkdir(parents=True, exist_ok=True)
    with state.open("a" if options.resume else "w", encoding="utf-8") as log:
        todo = [n for n in names if n not in results]
        end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        for i, result in enumerate(sweep(todo, chosen, kinds, options.jobs, options.limit, end), 1):
            results[result.name] = result
            log.write(json.dumps(dataclasses.asdict(result)) + "\n")
            log.flush()
            bad = {m: o for m, o in result.outcomes.items() if o not in ("ok", "-")}
            good = sum(o == "ok" for o in result.outcomes.values())
            print(
                f"[{i}/{len(todo)}] {result.name}: {result.problem or f'{good} ok'} ({result.seconds:.1f} s)",
                flush=True,
            )
            for method, outcome in bad.items():
                print(f"      {method}: {outcome}", flush=True)
    if len(results) < len(names):
        print(f"{len(names) - len(results)} classes are left; go on with --resume")
        return
    ordered = [results[n] for n in sorted(results)]
    text = report(ordered, chosen, other=options.other)
    if partial:
        print(text)
        return
    page = ROOT / "benchmarks" / f"coverage-other-{datetime.date.today()}.md" if options.other else REPORT
    page.write_text(text, encoding="utf-8")
    print(f"wrote {page.relative_to(ROOT)}")


def _read(path: Path, chosen: list[str]) -> dict[str, Result]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    results = [Result(**json.loads(line)) for line in lines if line.strip()]
    return {r.name: r for r in results if r.problem or set(chosen) <= set(r.outcomes)}


def sweep(
    names: list[str], chosen: list[str], kinds: dict[str, str], jobs: int, limit: float, end: float
) -> Iterator[Result]:
    """One process a class, `jobs` at a time; a class that takes too long or dies is one failed result."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        if time.monotonic() > end:
            waiting.clear()
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(theirs, name, chosen, kinds), daemon=True)
            process.start()
            theirs.close()
            running[name] = process, ours, time.monotonic()
        multiprocessing.connection.wait(
            [p.sentinel for p, _, _ in running.values()] + [c for _, c, _ in running.values()], 1.0
        )
        for name, (process, pipe, start) in list(running.items()):
            seconds = time.monotonic() - start
            result = _received(pipe)
            if result is None and process.is_alive() and seconds < limit:
                continue
            if result is None:
                why = (
                    f"took more than {limit:.0f} s" if process.is_alive() else f"process died (exit {process.exitcode})"
                )
                result = Result(name, problem=why)
            process.kill()
            process.join()
            pipe.close()
            del running[name]
            result.seconds = seconds
            yield result


def _received(pipe: Connection) -> Result | None:
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def _worker(pipe: Connection, name: str, chosen: list[str], kinds: dict[str, str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    try:
        pipe.send(run(name, chosen, kinds))
    except Exception as error:
        pipe.send(Result(name, problem=f"{type(error).__name__}: {error}"[:300]))


def run(name: str, chosen: list[str], kinds: dict[str, str]) -> Result:
    """All methods on one class."""
    kind = zoo.classes(kinds)[name][1]
    result = Result(name, zoo.model_class(name, kinds).__name__, kind)
    try:
        model = zoo.build(name, kinds)
    except Exception as error:
        result.problem = f"does not run: {error}"[:300]
        return result
    result.attention = attention_of(model)
    subject = Subject(model, zoo.inputs_for(kind, model))
    headed = None
    for method in chosen:
        if method in KEYS and not result.attention:
            result.outcomes[method] = "-"
        elif method not in HEADED:
            result.outcomes[method] = outcome(subject, method)
        elif kinds is not zoo.TEXT or name not in zoo.classes({"cls": zoo.TEXT["cls"]}):
            result.outcomes[method] = "-"
        else:
            classifier = zoo.build(name, {"cls": zoo.TEXT["cls"]})
            headed = Subject(classifier, zoo.inputs_for("cls", classifier))
            result.outcomes[method] = outcome(headed, method)
    for one in (subject, headed):
        if one is not None and not same(logits(one.model, one.inputs), one.base):
            marked = [m for m in result.outcomes if result.outcomes[m] == "ok" and (m in HEADED) == (one is headed)]
            result.outcomes |= dict.fromkeys(marked, "removing it does not restore the output")
    return result


class Subject:
    """One model, and what all methods on it are compared with."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.before = snapshot(model)
        self.base = logits(model, inputs)
        self.frozen = frozen_logits(model, inputs)


def attention_of(model: nn.Module) -> str:
    """How the model attends: "interface", "softmax" or "other", whichever comes first in that order; "" if it does not."""
    forms = {a.form for block in inlay.anatomy(model).blocks for a in block.attentions}
    return next((form for form in ("interface", "softmax", "other") if form in forms), "")


def outcome(subject: Subject, name: str) -> str:
    """ "ok", or what went wrong."""
    try:
        check(subject, SETTINGS[name](), unchanged=name in UNCHANGED)
    except Failed as error:
        said = str(error)
    except InlayError as error:
        said = f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"raised {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    else:
        said = "ok"
    with contextlib.suppress(InlayError):
        inlay.detach(subject.model)
    return " ".join(said.split())[:400]


def check(subject: Subject, method: Method, *, unchanged: bool) -> None:
    """All that a method must do on a model; that the output is restored in the end is checked once for all methods.

    Raises:
        Failed: one of the checks.
    """
    model, inputs, before = subject.model, subject.inputs, subject.before
    adapter = inlay.attach(model, method, "one")
    if unchanged:
        start = logits(model, inputs)
        if not (same(start, subject.frozen) or same(start, subject.base)):
            raise Failed(f"changes the output at the start (by {gap(start, subject.frozen):.1e})")
    step(model, adapter, inputs, {name for name, flag in before["requires_grad"].items() if not flag})
    trained = logits(model, inputs)
    if same(trained, subject.base):
        raise Failed("one step does not change the output")
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(Path(folder) / "adapter")
        inlay.detach(model, "one")
        compare(snapshot(model), before)
        inlay.load(model, path)
        if not same(logits(model, inputs), trained):
            raise Failed(f"loading it gives other outputs (by {gap(logits(model, inputs), trained):.1e})")
    inlay.detach(model)
    compare(snapshot(model), before)


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's first output, without gradients. Some models draw random numbers even in evaluation."""
    torch.manual_seed(0)
    with torch.no_grad():
        return first(model(**inputs))


def frozen_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The same with frozen parameters, for which torch takes other kernels here and there, with other roundings."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        return logits(model, inputs)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def first(output: Any) -> Tensor:
    """The first tensor of a result."""
    values = output.values() if hasattr(output, "values") else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs have equal bits; NaN, which some random models give, equals itself."""
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)))


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def step(model: nn.Module, adapter: inlay.Adapter, inputs: dict[str, Any], constant: set[str]) -> None:
    """One optimizer step towards a random target; every tensor must have a finite gradient.

    Excepted are parts that this input does not reach, and copies of what the model itself never trains (`constant`).
    """
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    found = inlay.anatomy(model)
    model.train(bool(found.reruns))  # such blocks are trained in training mode only
    try:
        torch.manual_seed(0)
        output = first(model(**inputs))
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output.float() * target).nan_to_num().mean().backward()
    finally:
        model.eval()
    idle = {p for p, leaf in found.leaves.items() if not leaf.called or leaf.rows == "routed"}
    without = []
    for key, parameter in adapter.named_parameters():
        excepted = key.replace(".full.module", "") in constant or any(key.startswith(p + ".") for p in idle)
        if parameter.requires_grad and parameter.grad is None and not excepted:
            without.append(key)
        elif parameter.grad is not None and not parameter.grad.isfinite().all():
            raise Failed(f"the gradient of {key} is not finite")
    if without:
        raise Failed(f"{len(without)} tensors without a gradient: {', '.join(without[:3])}")
    # Zero-initialised factors need a step that is felt in fp32, whatever the scale of the loss.
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.any():
            parameter.grad *= 0.1 * parameter.numel() ** 0.5 / parameter.grad.norm()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that removing an adapter must bring back."""
    modules = {path: (id(m), type(m)) for path, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    bits = {name: (id(t), t._version) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {"modules": modules, "requires_grad": flags, "tensors": bits, "keys": list(model.state_dict())}


def compare(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises Failed: something differs."""
    for what, value in before.items():
        if after[what] != value:
            raise Failed(f"removing it leaves other {what} behind")


TITLE = """# Coverage

Which method works on which architecture, written by `make coverage` (benchmarks/coverage.py says what is checked).
One tiny random model for each configuration class in transformers' mappings for causal, sequence-to-sequence and
masked language modelling and sequence classification."""
OTHER_TITLE = """# Coverage: vision and speech

The same checks as docs/coverage.md, written by `make coverage ARGS=--other`: one tiny random model for each configuration
class in transformers' mappings for image and audio classification, CTC and speech recognition. No promise is made for
these models; convolutional networks, which have no attention and few projections, are among them."""


def report(results: list[Result], chosen: list[str], *, other: bool = False) -> str:
    """docs/coverage.md, or the page on other models."""
    ran = [r for r in results if r.outcomes]
    attends = [r for r in ran if r.attention]
    full = [r for r in attends if r.attention != "other"]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "torch"))
    lines = [
        OTHER_TITLE if other else TITLE,
        "",
        f"* {datetime.date.today()}, `python benchmarks/coverage.py{' --other' if other else ''} --jobs 1`",
        f"* {versions}, Python {platform.python_version()}, {platform.machine()}",
        f"* {len(results)} configuration classes, {len(ran)} run a tiny forward pass",
        f"* {len(attends)} of these attend: {_count(ran, 'interface')} through transformers' attention interface, "
        f"{_count(ran, 'softmax')} by a softmax of their own, {_count(ran, 'other')} in another way only (linear, hashed, sampled)",
        "",
        "| method | works | of | % | refuses by name | fails |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method in chosen:
        outcomes = [r.outcomes[method] for r in ran if r.outcomes.get(method, "-") != "-"]
        good, refused = outcomes.count("ok"), sum(o.startswith("refused") for o in outcomes)
        share = f"{100 * good / len(outcomes):.1f}" if outcomes else "-"
        lines.append(
            f"| {method} | {good} | {len(outcomes)} | {share} | {refused} | {len(outcomes) - good - refused} |"
        )
    lines += [
        "",
        f"Methods that need an attention ({', '.join(KEYS)}) count the classes that attend; {len(full)} of those have a softmax",
        "over all keys. HeadOnly counts the classes that can classify. A refusal is an error that names the reason;",
        "it leaves the model as it was. Parts of a model that the inputs of this sweep do not reach (image towers, unused experts)",
        "need no gradient.",
        "",
        "## Refusals and failures",
        "",
    ]
    lines += _failures(ran, chosen)
    lines += ["", "## Classes that do not run", ""]
    lines += [f"* {r.name}: {_cell(r.problem)}" for r in results if not r.outcomes]
    return "\n".join(lines) + "\n"


def _failures(ran: list[Result], chosen: list[str]) -> list[str]:
    """One line a class and reason, with all methods that it stops."""
    lines = []
    for result in ran:
        reasons: dict[str, list[str]] = {}
        for method in chosen:
            said = result.outcomes.get(method, "-")
            if said not in ("ok", "-"):
                reasons.setdefault(said, []).append(method)
        lines += [f"* {result.name} ({', '.join(m)}): {_cell(said)}" for said, m in reasons.items()]
    return lines or ["None."]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _count(results: list[Result], attention: str) -> int:
    return Counter(r.attention for r in results)[attention]


if __name__ == "__main__":
    main()
