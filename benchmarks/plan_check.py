"""The memory that `inlay plan` and `inlay train` announce, beside what real steps take.

    python benchmarks/plan_check.py [--only NAME] [--device cuda]

Each run is a process of its own: a random model, a method, three steps of training. Measured are the bytes that
autograd keeps (each storage once, weights left out), and the peak. On the CPU that is the growth of the resident set
from before the model was built; freed memory is given back at once (`MALLOC_*`), so that the peak is one of tensors.
On a GPU it is the peak of what torch has allocated; there are runs of larger models as well, and every run happens in
this process. Prints a table in Markdown; a difference above 10 % is marked.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import LLAMA_1B, saved_bytes, storages

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "HF_HUB_OFFLINE": "1",
}
DECODER = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
}
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
ENCODER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
SEQ2SEQ = {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_heads": 8, "num_layers": 4, "vocab_size": 8192}

# name -> family, task, method, dtype, rows, tokens, checkpointing, quantised
RUNS: dict[str, tuple[str, str, str, str, int, int, bool, bool]] = {
    "llama lora fp32": ("llama", "causal-lm", "lora", "float32", 8, 256, False, False),
    "llama lora bf16": ("llama", "causal-lm", "lora", "bfloat16", 16, 256, False, False),
    "llama lora bf16 checkpointing": ("llama", "causal-lm", "lora", "bfloat16", 16, 256, True, False),
    "llama lora NF4": ("llama", "causal-lm", "lora", "bfloat16", 16, 256, False, True),
    "llama dora bf16": ("llama", "causal-lm", "dora", "bfloat16", 16, 256, False, False),
    "llama prefix bf16": ("llama", "causal-lm", "prefix", "bfloat16", 16, 256, False, False),
    "llama full fp32": ("llama", "causal-lm", "full", "float32", 8, 256, False, False),
    "bert bottleneck fp32": ("bert", "sequence-classification", "bottleneck", "float32", 32, 128, False, False),
    "bert bitfit fp32": ("bert", "sequence-classification", "bitfit", "float32", 32, 128, False, False),
    "t5 lora fp32": ("t5", "seq2seq", "lora", "float32", 8, 128, False, False),
    "llama 32K words lora bf16": ("llama-32k", "causal-lm", "lora", "bfloat16", 8, 256, False, False),
    "gpt2 ia3 fp32": ("gpt2", "causal-lm", "ia3", "float32", 8, 128, False, False),
}
ON_A_GPU = {
    "1B lora bf16": ("llama-1b", "causal-lm", "lora", "bfloat16", 4, 1024, False, False),
    "1B lora bf16 checkpointing": ("llama-1b", "causal-lm", "lora", "bfloat16", 8, 2048, True, False),
    "1B lora NF4": ("llama-1b", "causal-lm", "lora", "bfloat16", 4, 1024, False, True),
    "1B prefix bf16": ("llama-1b", "causal-lm", "prefix", "bfloat16", 4, 1024, False, False),
    "1B bottleneck bf16": ("llama-1b", "causal-lm", "bottleneck", "bfloat16", 4, 1024, False, False),
    "1B full bf16": ("llama-1b", "causal-lm", "full", "bfloat16", 4, 1024, False, False),
    "8B lora NF4 checkpointing": ("llama-8b", "causal-lm", "lora", "bfloat16", 2, 2048, True, True),
}
"""Shapes of Llama 3.2 1B and Llama 3.1 8B."""


def build(family: str, task: str, dtype: str) -> Any:
    import torch
    import transformers

    config = {
        "llama": lambda: transformers.LlamaConfig(**DECODER),
        "llama-1b": lambda: transformers.LlamaConfig(**LLAMA_1B),
        "llama-8b": lambda: transformers.LlamaConfig(**LLAMA_8B),
        "llama-32k": lambda: transformers.LlamaConfig(**DECODER | {"vocab_size": 32_000, "num_hidden_layers": 4}),
        "gpt2": lambda: transformers.GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=16_384),
        "bert": lambda: transformers.BertConfig(**ENCODER),
        "t5": lambda: transformers.T5Config(**SEQ2SEQ),
    }[family]()
    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[task]
    return auto.from_config(config, dtype=getattr(torch, dtype))


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(r for r in Path("/proc/self/status").read_text().splitlines() if r.startswith(key))
    return 1024 * int(line.split()[1])


class Gauge:
    """How the peak of a device is read."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes in use."""
        import torch

        gc.collect()
        return resident("VmRSS") if self.device == "cpu" else torch.cuda.memory_allocated()

    def restart(self) -> None:
        """Forget the peak so far."""
        import torch

        gc.collect()
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most bytes since then."""
        import torch

        return resident("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()


def measure(name: str, device: str) -> dict[str, float]:
    """One run, in this process."""
    import torch

    import inlay
    from inlay.config_loading import build_method
    from inlay.planning.skeleton import twin
    from inlay.planning.step import Conditions, inputs_like, record
    from inlay.train import memory
    from inlay.train.output_head import OutputHead

    family, task, method, dtype, rows, length, checkpointing, quantised = (RUNS | ON_A_GPU)[name]
    torch.manual_seed(0)
    torch.set_default_device(device)
    # Libraries take their own buffers when first used.
    warm = torch.nn.Linear(256, 256, dtype=getattr(torch, dtype))
    warm(torch.randn(64, 256, dtype=getattr(torch, dtype))).sum().backward()
    ids = torch.randint(5, 4096, (rows, length))
    labels = torch.randint(0, 2, (rows,)) if task == "sequence-classification" else ids
    inputs = {"input_ids": ids, "labels": labels} | ({"decoder_input_ids": ids} if task == "seq2seq" else {})
    if device == "cpu":
        inlay.attach(build(family, task, dtype), build_method(method))
    gauge = Gauge(device)
    before = gauge.now()
    model = build(family, task, dtype)
    if quantised:
        inlay.quantize(model, inlay.NF4())
    adapter = inlay.attach(model, build_method(method))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(adapter.parameters(), fused=True)
    head = OutputHead(model, task)
    for i in range(3 if device == "cpu" else 4):
        if i == 0 or (i == 1 and device != "cpu"):  # a GPU's first step times kernels beside each other
            gauge.restart()
        head.loss(inputs, 0.0).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = gauge.peak() - before
    known = storages(model) | {t.untyped_storage().data_ptr() for t in inputs.values()}
    kept = saved_bytes(lambda: head.loss(inputs, 0.0).total, known)
    announced = memory.estimate(model, inputs, task, "adamw_torch_fused", checkpointing=checkpointing)
    conditions = Conditions(device="cpu" if device == "cpu" else "cuda", checkpointing=checkpointing)
    held = record(twin(model), task, inputs_like(inputs, rows), conditions).held
    return {
        "peak": peak, "announced": announced.total, "weights": announced.weights,
        "saved": kept, "held": held[0] + rows * held[1], "checkpointing": checkpointing,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, "cpu")))
        return
    print(f"{datetime.date.today()}, {where(arguments.device)}; MiB\n")
    print("| run | kept, measured | kept, announced | off | peak, measured | peak, announced | off |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in RUNS if arguments.device == "cpu" else RUNS | ON_A_GPU:
        if arguments.only and arguments.only not in name:
            continue
        if arguments.device == "cpu":
            command = [sys.executable, "-W", "ignore", __file__, "--one", name]
            done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:120]} |", flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            found = measure(name, arguments.device)
        kept = ("-", f"{found['held'] / 2**20:.0f}", "-")
        if not found["checkpointing"]:
            kept = (f"{found['saved'] / 2**20:.0f}", kept[1], off(found["held"], found["saved"]))
        peak = (
            f"{found['peak'] / 2**20:.0f}",
            f"{found['announced'] / 2**20:.0f}",
            off(found["announced"], found["peak"]),
        )
        print(f"| {name} | {' | '.join((*kept, *peak))} |", flush=True)


def where(device: str) -> str:
    """The machine in words."""
    import torch

    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    return cpu if device == "cpu" else f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def off(announced: float, measured: float) -> str:
    """The difference in percent, marked where it is above ten."""
    percent = 100 * (announced / measured - 1)
    return f"**{percent:+.1f} %**" if abs(percent) > 10 else f"{percent:+.1f} %"


if __name__ == "__main__":
    main()
