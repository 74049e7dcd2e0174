"""Many adapters in one batch: inlay beside PEFT's `adapter_names`, in one interleaved run.

    python benchmarks/rows.py [--quick] [--write benchmarks/rows-DATE.md]
    python benchmarks/rows.py --only decode layer     # some cases; --write then takes the others from their last run
    python benchmarks/rows.py --device cuda           # in the shape of Llama 3.2 1B, in bf16

Prints a table of ratios, and writes it as a page. Every variant of a case is timed in turn, round after round; the
figure is the median of each variant's fastest third, so that a neighbour's burst on a shared machine hits all variants
alike and counts for none. What was measured is kept in build/rows-DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from measure import LLAMA_1B, synchronise

import inlay
from inlay.sweep.together import passes
from inlay.train.output_head import OutputHead

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


BUILD = Path(__file__).resolve().parent.parent / "build"
LINES: list[str] = []


def say(line: str) -> None:
    """Prints a line and keeps it for the page."""
    print(line, flush=True)
    LINES.append(line)


Variants = dict[str, tuple[Callable[[], object], Callable[[], object]]]


def nothing() -> None:
    """No preparation."""


def llama() -> transformers.LlamaForCausalLM:
    """The base on the present device."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    on_a_gpu = torch.get_default_device().type == "cuda"
    torch.set_default_dtype(torch.bfloat16 if on_a_gpu else torch.float32)
    try:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA_1B if on_a_gpu else SMALL)))
    finally:
        torch.set_default_dtype(torch.float32)


def timed(variants: Variants, rounds: int) -> dict[str, float]:
    """Milliseconds of each variant; its preparation (choosing adapters, once for many steps) is not timed."""
    for prepare, run in variants.values():
        prepare()
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (prepare, run) in variants.items():
            prepare()
            synchronise(torch.get_default_device().type)
            start = time.perf_counter()
            run()
            synchronise(torch.get_default_device().type)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(t)[len(t) // 6] for name, t in times.items()}


def models(adapters: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One base twice: with inlay's adapters and with PEFT's, the same random factors in both."""
    import peft

    base = llama().eval()
    ours, theirs = base, copy.deepcopy(base)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config, adapter_name="a0")
    for i in range(1, adapters):
        theirs.add_adapter(f"a{i}", config)
    for i in range(adapters):
        adapter = inlay.attach(ours, inlay.LoRA(rank=8, alpha=16), name=f"a{i}")
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                path, letter = name.split(".lora.")
                module = theirs.get_submodule(f"base_model.model.{path}.lora_{letter}.a{i}")
                parameter.copy_(module.weight)
    return ours, theirs.eval()


def decode(rows: int, adapters: int, tokens: int, rounds: int) -> None:
    """One forward pass without gradients, `tokens` a row, for one adapter, several in one batch, and none."""
    ours, theirs = models(adapters)
    ids = torch.randint(3, 8000, (rows, tokens))
    names = [f"a{i % adapters}" for i in range(rows)]

    def once() -> object:
        with torch.inference_mode():
            return ours(input_ids=ids).logits

    def peft_one() -> object:
        with torch.inference_mode():
            return theirs(input_ids=ids).logits

    def peft_mixed() -> object:
        with torch.inference_mode():
            return theirs(input_ids=ids, adapter_names=names).logits

    variants = {
        "base": (lambda: inlay.use(ours, None), once),
        "one": (lambda: inlay.use(ours, "a0"), once),
        "mixed": (lambda: inlay.use(ours, names), once),
        "PEFT one": (lambda: theirs.set_adapter("a0"), peft_one),
        "PEFT mixed": (nothing, peft_mixed),
    }
    inlay.use(ours, names)
    if ids.is_cpu:
        torch.testing.assert_close(once(), peft_mixed(), rtol=1e-3, atol=1e-4)
    else:  # in bf16, where both round at other places
        found, wanted = once().float(), peft_mixed().float()
        assert (found - wanted).norm() < 0.05 * wanted.norm()
    ms = timed(variants, rounds)
    say(
        f"{rows} rows x {tokens:3} tokens, {adapters} adapters   "
        + "  ".join(f"{n} {t:7.2f} ms" for n, t in ms.items())
        + f"   mixed / one {ms['mixed'] / ms['one']:.2f}  mixed / PEFT one {ms['mixed'] / ms['PEFT one']:.2f}"
        + f"  PEFT mixed / PEFT one {ms['PEFT mixed'] / ms['PEFT one']:.2f}"
    )


def layer(rows: int, width: int, adapters: int, used: int, rounds: int) -> None:
    """One projection: what the adapters add to it, inlay beside PEFT."""
    import peft

    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False)).eval()
    theirs = copy.deepcopy(ours)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config, adapter_name="a0")
    for i in range(1, adapters):
        theirs.add_adapter(f"a{i}", config)
    for i in range(adapters):
        for parameter in inlay.attach(ours, inlay.LoRA(rank=16, sites="0"), name=f"a{i}").parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    x, names = torch.randn(rows, width), [f"a{i % used}" for i in range(rows)]
    plain = theirs.base_model.model[0]

    def mixed() -> object:
        with torch.no_grad():
            return ours[0](x)

    def alone() -> object:
        with torch.no_grad():
            return torch.nn.functional.linear(x, ours[0].weight)

    def peft_mixed() -> object:
        with torch.no_grad():
            return plain(x, adapter_names=names)

    inlay.use(ours, names)
    ms = timed({"base": (nothing, alone), "mixed": (nothing, mixed), "PEFT mixed": (nothing, peft_mixed)}, rounds)
    ours_added, peft_added = ms["mixed"] - ms["base"], ms["PEFT mixed"] - ms["base"]
    say(
        f"{rows} rows, d {width}, {used} of {adapters} adapters   base {ms['base']:.2f} ms  inlay +{ours_added:.2f}"
        f"  PEFT +{peft_added:.2f}   added / PEFT's {ours_added / peft_added:.2f}"
    )


def train(adapters: int, rows: int, tokens: int, rounds: int) -> None:
    """K adapters, each on its own rows: together beside one pass for each, and beside one adapter for all.

    All take the loss of `inlay train`: the frozen output projection a piece at a time. "Together" are the passes of
    `inlay sweep`, which fill the machine and no more; "one pass" has all rows.
    """
    model = llama().train()
    for i in range(adapters):
        inlay.attach(model, inlay.LoRA(rank=8), name=f"a{i}")
    ids = torch.randint(3, 8000, (adapters * rows, tokens))
    names = [f"a{i // rows}" for i in range(adapters * rows)]
    head = OutputHead(model, "causal-lm")
    with inlay.use(model, "a0"), torch.no_grad():
        head.loss({"input_ids": ids[:1], "labels": ids[:1]}, 0.0)  # what it looks up once, it looks up on one row

    def step(use: str | list[str], part: torch.Tensor) -> None:
        with inlay.use(model, use):
            head.loss({"input_ids": part, "labels": part}, 0.0).total.backward()

    def one_pass() -> None:
        step(names, ids)

    def together() -> None:
        for some in passes(adapters, rows * tokens, ids.device):
            part = slice(some.start * rows, some.stop * rows)
            step(names[part] if len(some) > 1 else names[part.start], ids[part])

    def alike() -> None:
        step("a0", ids)

    def apart() -> None:
        for i in range(adapters):
            step(f"a{i}", ids[i * rows : (i + 1) * rows])

    calls = {"together": together, "apart": apart, "one pass": one_pass, "alike": alike}
    ms = timed({name: (nothing, call) for name, call in calls.items()}, rounds)
    say(
        f"training {adapters} adapters, {rows} x {tokens} tokens each   together {ms['together']:.1f} ms  "
        f"one after another {ms['apart']:.1f} ms   {ms['apart'] / ms['together']:.2f} x as fast   "
        f"all rows in one pass {ms['one pass']:.1f} ms   one adapter on the whole batch {ms['alike']:.1f} ms"
    )


def attaching(adapters: int) -> None:
    """What attaching costs on a model of 168 projections, for the first adapters and for the last, beside PEFT."""
    import peft

    transformers.logging.set_verbosity_error()
    deep = SMALL | {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 688}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**deep)).eval()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    theirs = copy.deepcopy(base)
    ours_ms, peft_ms = [], []
    start = time.perf_counter()
    inlay.anatomy(base)
    anatomy_ms = 1e3 * (time.perf_counter() - start)
    for i in range(adapters):
        start = time.perf_counter()
        inlay.attach(base, inlay.LoRA(rank=8), name=f"a{i}")
        ours_ms.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        theirs = peft.get_peft_model(theirs, config, adapter_name="a0") if i == 0 else theirs
        if i:
            theirs.add_adapter(f"a{i}", config)
        peft_ms.append(1e3 * (time.perf_counter() - start))

    def middle(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    say(
        f"attach on 168 projections: anatomy {anatomy_ms:.0f} ms once; inlay adapters 2 to 9 {middle(ours_ms[1:9]):.1f} ms,"
        f" last 8 of {adapters} {middle(ours_ms[-8:]):.1f} ms;  PEFT {middle(peft_ms[1:9]):.1f} ms,"
        f" last 8 {middle(peft_ms[-8:]):.1f} ms"
    )


def where(device: str) -> str:
    """What runs the cases."""
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else f", {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}{gpu}"


def write(path: str, lines: list[str]) -> None:
    """The lines as a page."""
    command = f"python benchmarks/rows.py --write {path}"
    head = f"# Many adapters in one batch\n\n`{command}`; medians of each variant's fastest third, interleaved.\n\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(head + "```\n" + "\n".join(lines) + "\n```\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1: no barriers on a shared machine)")
    parser.add_argument("--write", metavar="FILE", help="also write the lines as a Markdown page")
    parser.add_argument("--only", nargs="+", choices=("decode", "layer", "train", "attach"), help="these cases")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    state = BUILD / f"rows-{options.device}.json"
    rounds = 6 if options.quick else 30
    cases: dict[str, list[Callable[[], None]]] = {
        "decode": [lambda: decode(16, 8, 1, rounds * 3), lambda: decode(16, 8, 64, max(rounds // 2, 6))],
        "layer": [lambda: layer(32, 1024, 32, 20, rounds * 4), lambda: layer(32, 4096, 32, 17, rounds * 4)],
        "train": [lambda: train(8, 1, 16, rounds), lambda: train(8, 4, 128, max(rounds // 5, 3))],
        "attach": [lambda: attaching(64)],
    }
    known: dict[str, list[str]] = json.loads(state.read_text()) if state.exists() else {}
    for name in options.only or cases:
        LINES.clear()
        say(f"{name}: {where(options.device)}, load {os.getloadavg()[0]:.1f}")
        for case in cases[name]:
            case()
        known[name] = list(LINES)
        state.parent.mkdir(exist_ok=True)
        state.write_text(json.dumps(known, indent=1))
    if options.write:
        write(options.write, [line for name in cases for line in known.get(name, [f"{name}: not measured"])])


if __name__ == "__main__":
    main()
