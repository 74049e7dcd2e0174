"""What it costs to attach LoRA to 168 projections, the first time, again, and for the 64th time; beside PEFT.

    python benchmarks/attach.py [--hidden 1024] [--adapters 64]
    python benchmarks/attach.py --meta       # anatomy and LoRA of a 70B-shaped Llama on the meta device

The model is a Llama of 24 layers with 7 projections each. "First" includes finding the anatomy; every figure is the
median of several fresh models, in milliseconds, printed with the fastest.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import inlay

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LARGE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def build(layers: int, hidden: int) -> torch.nn.Module:
    """A Llama without the time that random weights take."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=1024,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    return model


def milliseconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def shown(name: str, times: list[float]) -> None:
    """One line of the table."""
    print(f"{name:<44} {statistics.median(times):8.1f} {min(times):8.1f}", flush=True)


def ours(hidden: int, adapters: int, rounds: int) -> None:
    """inlay's figures."""
    method = inlay.LoRA(rank=8, sites="linear")
    first, known, detached = [], [], []
    for _ in range(rounds):
        model = build(24, hidden)
        first.append(milliseconds(lambda model=model: inlay.attach(model, method)))
        detached.append(milliseconds(lambda model=model: inlay.detach(model)))
        for _ in range(3):
            known.append(milliseconds(lambda model=model: inlay.attach(model, method)))
            inlay.detach(model)
    fresh = (build(24, hidden) for _ in range(rounds))
    found = [milliseconds(lambda model=model: inlay.anatomy(model)) for model in fresh]
    shown("inlay: anatomy alone", found)
    shown("inlay: attach, first (with anatomy)", first)
    shown("inlay: attach, anatomy known", known)
    shown("inlay: detach", detached)
    times = [milliseconds(lambda i=i: inlay.attach(model, method, name=f"a{i}")) for i in range(adapters)]
    shown("inlay: adapters 1 to 8", times[:8])
    shown(f"inlay: adapters {adapters - 7} to {adapters}", times[-8:])


def peers(hidden: int, adapters: int, rounds: int) -> None:
    """PEFT's figures."""
    import peft

    config = peft.LoraConfig(r=8, target_modules=TARGETS)
    first = []
    for _ in range(rounds):
        model = build(24, hidden)
        first.append(milliseconds(lambda model=model: peft.get_peft_model(model, config)))
    shown("PEFT: get_peft_model", first)
    wrapped = peft.get_peft_model(build(24, hidden), config, adapter_name="a0")
    times = [milliseconds(lambda i=i: wrapped.add_adapter(f"a{i}", config)) for i in range(1, adapters)]
    shown("PEFT: adapters 2 to 9", times[:8])
    shown(f"PEFT: adapters {adapters - 7} to {adapters}", times[-8:])


def meta() -> None:
    """A model of 70B parameters that holds none."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LARGE))
    seconds = milliseconds(lambda: inlay.anatomy(model)) / 1e3
    adapter: list[inlay.Adapter] = []
    attached = milliseconds(lambda: adapter.append(inlay.attach(model, inlay.LoRA(rank=16, sites="linear")))) / 1e3
    h, f, kv, layers = 8192, 28672, 1024, 80
    expected = 16 * layers * (2 * (h + h) + 2 * (h + kv) + 2 * (h + f) + (f + h))
    count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{count / 1e9:.1f}B parameters on meta: anatomy {seconds:.2f} s, attach {attached:.2f} s")
    print(f"LoRA trains {adapter[0].trained_parameters:,}; by the formula {expected:,}")
    assert adapter[0].trained_parameters == expected


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--meta", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.meta:
        meta()
        return
    warm = build(2, 64)
    inlay.attach(warm, inlay.LoRA(rank=2, sites="linear"))
    print(f"load {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads; median and fastest, ms")
    ours(options.hidden, options.adapters, options.rounds)
    peers(options.hidden, options.adapters, options.rounds)


if __name__ == "__main__":
    main()
