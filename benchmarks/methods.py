"""Every method trained with its own defaults: decoder, encoder, encoder-decoder; real data where there is some.

    python benchmarks/methods.py --minutes 8      # goes on where it stopped; again until it says that all is done
    python benchmarks/methods.py --table          # writes benchmarks/methods-<date of the newest cell>.md

Four tasks, each the same rows, batches per step and number of steps for all methods, batch size and learning rate as
`inlay train` would choose them for that method (`src/inlay/train/defaults.py`):

    e2e         a Llama of 656,000 parameters trained on short stories learns to write restaurant descriptions
    mr          MiniLM (22.7 million) tells positive from negative film reviews
    banking     MiniLM tells 77 intents of bank customers apart
    reverse     a BART of 0.7 million parameters that has learnt to copy, reverse, sort and drop letters on command is
                given letters without a command, and learns that it is to reverse them

The BART is trained here (`Full`, once, about two minutes) from random weights: a base that knows nothing has nothing for
prompts or prefixes to bring out. The yardstick is the task head alone where there is a head, else the untouched base.
One line of JSON for each finished cell stands in `<out>/cells.jsonl`; delete a line to measure that cell again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from inlay.config_loading import load
from inlay.train.defaults import TABLE, defaults

HERE = Path(__file__).resolve().parent
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COMMANDS = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "sort": sorted,
    "drop": lambda s: s[1:],
}

METHODS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in TABLE},
    "houlsby": {"name": "bottleneck", "size": 64, "init": "houlsby", "train_norms": True},
    "pfeiffer": {"name": "bottleneck", "reduction": 16, "sites": ["ffn.norm"], "activation": "relu", "init": "bert"},
    "scaled_parallel": {"name": "bottleneck", "size": 512, "sites": "ffn", "reads": "x", "activation": "relu",
                        "scale": 4.0},
}  # fmt: skip
"""Each method of `src/inlay/methods` with its own defaults, and the presets of `Bottleneck` besides."""

INSTEAD = {
    ("bitfit", "e2e"): {"name": "bitfit", "add_missing": True},
}
RAISED = (
    "bottleneck", "pfeiffer", "scaled_parallel", "inlay", "full", "bitfit", "ia3", "prefix", "prompt", "ptuning",
    "diffpruning",
)  # fmt: skip
"""Methods trained once more on the two small bases with ten times the learning rate: their defaults are for models a
thousand times as large."""
UNDEFINED = {
    ("headonly", "e2e"): "a language model has no task head",
    ("headonly", "reverse"): "a language model has no task head",
}


@dataclass(frozen=True)
class Task:
    """One data set and base model, and what its runs have in common."""

    base: str
    keys: dict[str, Any]
    score: str
    lower_is_better: bool = False
    floor: str = "headonly"
    settings: dict[str, Any] = field(default_factory=dict)


def tasks(shared: Path, out: Path) -> dict[str, Task]:
    """The four tasks."""
    data = shared / "data"
    mr = data / "mr_sentence_polarity" / "sentence_polarity"
    banking, e2e = data / "banking77", data / "e2e_nlg" / "e2e-dataset"
    texts = {"generation_eval_rows": 64, "generation_max_new_tokens": 48, "bf16": False}
    return {
        "e2e": Task(
            "Llama, 656 K",
            {"model": str(data / "weights_tinystories_656k" / "bf16"), "data": f"{e2e / 'trainset.csv'}#4000",
             "eval_data": f"{e2e / 'devset.csv'}#300", "task": "causal-lm", "max_steps": 400, "max_length": 256,
             "dtype": "float32", **texts},
            "loss", lower_is_better=True, floor="untouched",
        ),
        "mr": Task(
            "MiniLM, 22.7 M",
            {"model": MINILM, "data": f"{mr}#3200", "eval_fraction": 0.2, "max_steps": 80, "max_length": 48},
            "accuracy",
        ),
        "banking": Task(
            "MiniLM, 22.7 M",
            {"model": MINILM, "data": str(banking / "train.csv"), "eval_data": f"{banking / 'test.csv'}#770",
             "columns": {"text": "text", "label": "category"}, "max_steps": 120, "max_length": 32},
            "accuracy",
        ),
        "reverse": Task(
            "BART, 0.7 M",
            {"model": str(out / "bart"), "data": str(out / "reverse.jsonl"), "eval_data": str(out / "held-out.jsonl"),
             "task": "seq2seq", "max_steps": 400, **texts},
            "loss", lower_is_better=True, floor="untouched",
        ),
    }  # fmt: skip


def write_letters(path: Path, rows: int, seed: int, commands: list[str], shown: str | None) -> None:
    """Rows of the letter tasks; `shown` stands where the command would."""
    choose = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            command = choose.choice(commands)
            letters = [choose.choice(LETTERS) for _ in range(choose.randint(4, 8))]
            row = {
                "prompt": " ".join([shown or command, *letters]),
                "completion": " ".join(COMMANDS[command](letters)),
            }
            file.write(json.dumps(row) + "\n")


def make_base(out: Path) -> None:
    """The small BART: random weights, then full fine-tuning on all commands with inlay's own loop, then merged."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    import inlay
    from inlay.train.run import train

    if (out / "bart").exists():
        return
    words = ["<pad>", "<s>", "</s>", "<unk>", "task", *COMMANDS, *LETTERS]
    wordlevel = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    wordlevel.pre_tokenizer = pre_tokenizers.Whitespace()
    wordlevel.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=wordlevel, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.BartConfig(
        vocab_size=len(words), d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    raw = out / "bart-random"
    transformers.BartForConditionalGeneration(config).save_pretrained(raw)
    tokenizer.save_pretrained(raw)
    write_letters(out / "commands.jsonl", 60_000, 1, list(COMMANDS), None)
    write_letters(out / "reverse.jsonl", 4_000, 2, ["reverse"], "task")
    write_letters(out / "held-out.jsonl", 400, 3, ["reverse"], "task")
    shutil.rmtree(out / "bart-run", ignore_errors=True)
    keys = {
        "model": str(raw), "data": str(out / "commands.jsonl"), "output_dir": str(out / "bart-run"), "task": "seq2seq",
        "method": "full", "learning_rate": 1e-3, "per_device_train_batch_size": 64, "num_train_epochs": 4.0,
        "eval_fraction": 0.01, "bf16": False, "eval_samples": 0, "generation_max_new_tokens": 12,
    }  # fmt: skip
    result = train(load(flags=keys), quiet=True)
    print(f"base for `reverse`: {result.results['Full']}", flush=True)
    model = transformers.BartForConditionalGeneration.from_pretrained(raw)
    inlay.load(model, result.run / "adapter").merge(permanent=True)
    model.save_pretrained(out / "bart-new")
    tokenizer.save_pretrained(out / "bart-new")
    (out / "bart-new").rename(out / "bart")


def cells(chosen: dict[str, Task]) -> Iterator[tuple[str, str]]:
    """(task, method) for everything that is to be measured."""
    for task in chosen:
        for method in METHODS:
            if (method, task) not in UNDEFINED:
                yield task, method
        if chosen[task].floor == "untouched":
            yield from ((task, f"{method} x10") for method in RAISED)


def measure(name: str, task: Task, method: str, out: Path) -> dict[str, Any]:
    """Train one method on one task."""
    import torch
    import transformers

    from inlay.config_loading import build_method
    from inlay.train.run import train

    method, _, faster = method.partition(" ")
    setting = INSTEAD.get((method, name), METHODS[method])
    run = out / "runs" / f"{name}-{method}"
    shutil.rmtree(run, ignore_errors=True)
    steps = task.keys["max_steps"]
    keys = {
        **task.keys, "method": setting, "output_dir": str(run), "baseline": False, "eval_samples": 0,
        "eval_steps": steps, "logging_steps": max(1, steps // 20), "save_total_limit": 1,
    }  # fmt: skip
    if faster:
        keys["learning_rate"] = float(faster[1:]) * defaults(setting, task.keys.get("task", "")).learning_rate
    config = load(flags=keys)
    began, processor = time.monotonic(), time.process_time()
    result = train(config, quiet=True)
    seconds = {"wall": time.monotonic() - began, "processor": time.process_time() - processor}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    resolved = load(run / "config.yaml")
    ours = next(metrics for title, metrics in result.results.items() if title != "untouched")
    stored = json.loads((run / "adapter" / "adapter.json").read_text())
    shutil.rmtree(run)
    return {
        "task": name,
        "method": f"{method} {faster}".strip(),
        "setting": repr(build_method(setting)),
        "learning_rate": (resolved.head_learning_rate if method == "headonly" else None) or resolved.learning_rate,
        "head_learning_rate": resolved.head_learning_rate,
        "batch": resolved.per_device_train_batch_size,
        "steps": steps,
        "trained": result.trained_parameters,
        "stored": stored["stored_parameters"],
        "bytes": result.adapter_bytes,
        "train_loss": [losses[0], losses[-1]],
        "untouched": result.results["untouched"],
        "held_out": ours,
        "seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finished(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The cells measured so far; of one measured twice the last."""
    path = out / "cells.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["task"], row["method"]): row for row in rows}


def floor_of(task: Task, name: str, done: dict[tuple[str, str], dict[str, Any]]) -> float:
    """The score to beat; not a number while it is not measured."""
    if task.floor == "untouched":
        return next((float(row["untouched"][task.score]) for (t, _), row in done.items() if t == name), math.nan)
    row = done.get((name, task.floor))
    return float(row["held_out"][task.score]) if row else math.nan


def table(chosen: dict[str, Task], done: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The page, without its notes."""
    any_row = next(iter(done.values()))
    date = max(row["date"] for row in done.values())
    lines = [
        f"# Every method trained with its defaults, {date}",
        "",
        "Written by `python benchmarks/methods.py` (what the tasks are stands there); torch "
        f"{any_row['torch'].split('+')[0]}, transformers {any_row['transformers']}, {any_row['threads']} thread of a "
        "shared 2-core machine, so seconds are processor time of the whole run: data, model, training, evaluation. "
        "Losses are nats per target; the training losses are means over the first and the last twentieth of the steps. "
        "One seed. Settings are the methods' defaults, those of `Bottleneck`'s presets, or as named.",
    ]
    for name, task in chosen.items():
        rows = [row for (t, _), row in done.items() if t == name]
        if not rows:
            continue
        floor = floor_of(task, name, done)
        against = "the head alone" if task.floor == "headonly" else "the untouched base"
        extra = ", BLEU and exact match of 64 greedy texts" if "bleu" in rows[0]["held_out"] else ""
        lines += [
            "",
            f"## {name}: {task.base}, {rows[0]['steps']} steps",
            "",
            f"Score: held-out {task.score.replace('_', ' ')}{extra}; {against} "
            + ("is not measured yet." if math.isnan(floor) else f"has {floor:.3f}."),
            "",
            "| method | lr | batch | trained | stored | training loss | held-out loss | score | gain |"
            + (" BLEU | exact |" if extra else "")
            + " s |",
            "|---|---|---|---|---|---|---|---|---|" + ("---|---|" if extra else "") + "---|",
        ]
        for row in sorted(rows, key=lambda r: r["held_out"][task.score], reverse=not task.lower_is_better):
            ours, score = row["held_out"], row["held_out"][task.score]
            gain = floor - score if task.lower_is_better else score - floor
            wrote = f" {ours['bleu']:.1f} | {ours['exact_match']:.2f} |" if extra else ""
            name_shown = row["method"] + (" *" if (row["method"], name) in INSTEAD else "")
            lines.append(
                f"| {name_shown} | {row['learning_rate']:g} | {row['batch']} | {row['trained']:,} | {row['stored']:,} | "
                f"{row['train_loss'][0]:.3f} → {row['train_loss'][1]:.3f} | "
                f"{row['untouched']['loss']:.3f} → {ours['loss']:.3f} | {score:.3f} | {'' if math.isnan(gain) else f'{gain:+.3f}'} |{wrote} "
                f"{row['seconds']['processor']:.0f} |"
            )
        absent = {m: why for (m, t), why in UNDEFINED.items() if t == name}
        lines += ["", *(f"Not there: {m}, since {why}." for m, why in absent.items())] if absent else []
        used = [f"`{done[t, m]['setting']}`" for m, t in INSTEAD if t == name and (t, m) in done]
        lines += ["", f"\\* {', '.join(used)}."] if used else []
    return lines


def write_table(path: Path, lines: list[str]) -> None:
    """The generated part; notes that a person wrote below it stay."""
    mark = "\n## Notes\n"
    notes = path.read_text(encoding="utf-8").partition(mark)[2] if path.exists() else ""
    path.write_text("\n".join(lines) + "\n" + (mark + notes if notes else ""), encoding="utf-8")
    print(f"wrote {path}")


def main() -> None:
    default = os.environ.get("INLAY_SHARED", HERE.parents[1] / "shared")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(default), help="the folder of test data")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="where runs and results are kept")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no new cell after this time")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="tasks or methods; both, to cross them")
    parser.add_argument("--table", action="store_true", help="write the table of what is finished, and train nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen, began = tasks(arguments.shared.resolve(), out), time.monotonic()
    done = finished(out)
    if not arguments.table:
        only_tasks = set(arguments.only) & set(chosen) or set(chosen)
        only_methods = set(arguments.only) - set(chosen)
        wanted = [(t, m) for t, m in cells(chosen) if t in only_tasks and (not only_methods or m in only_methods)]
        rest = [cell for cell in wanted if cell not in done]
        print(f"{len(wanted) - len(rest)} of {len(wanted)} cells are done", flush=True)
        if rest:
            import transformers

            transformers.logging.set_verbosity_error()
        for number, (name, method) in enumerate(rest, 1):
            if time.monotonic() - began > 60 * arguments.minutes:
                print(f"{len(rest) - number + 1} cells are left; start again to go on")
                return
            if name == "reverse":
                make_base(out)
            row = measure(name, chosen[name], method, out)
            done[name, method] = row
            with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            score = chosen[name].score
            print(
                f"{number:2}/{len(rest)} {name:8} {method:15} loss {row['train_loss'][0]:.3f} -> "
                f"{row['train_loss'][1]:.3f}  {score} {row['untouched'][score]:.3f} -> {row['held_out'][score]:.3f}  "
                f"{row['seconds']['processor']:.0f} s",
                flush=True,
            )
    if done:
        write_table(HERE / f"methods-{max(row['date'] for row in done.values())}.md", table(chosen, done))


if __name__ == "__main__":
    main()
