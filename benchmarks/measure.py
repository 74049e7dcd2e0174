"""How the benchmarks measure: in turn, as medians with spread, with the load of the machine beside them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

MIB = 1 << 20
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""The shape of Llama 3.2 1B, for `LlamaConfig`."""
KEEP_PAGES = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**31 - 1}:glibc.malloc.top_pad={512 << 20}"
}
"""An environment in which glibc serves everything from a heap that never shrinks."""


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of some figures."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, all called in turn so that drift meets all alike; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: spread(values) for name, values in times.items()}


def synchronise(device: str) -> None:
    """Waits until a device has done what it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def saved_bytes(run: Callable[[], Any], known: set[int]) -> int:
    """Bytes that autograd keeps for a backward pass, each storage once, without those in `known`."""
    import torch

    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = run()
    total = sum(kept.values())
    del result
    return total


def storages(model: Any) -> set[int]:
    """Where the parameters and buffers of a model lie."""
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def reset_peak_rss() -> int:
    """Forget the peak so far; the memory in use now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def give_back_memory() -> None:
    """Ask glibc to return what is free, so that one measurement does not inherit the heap of another."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def processor() -> str:
    """The name of the processor, with the extensions that decide about matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {line.split(":")[0].strip(): line.split(":", 1)[-1].strip() for line in lines if ":" in line}
    flags = found.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{found.get('model name', platform.machine())} ({', '.join(extensions)})"


def machine() -> dict[str, Any]:
    """What a report must say about where it was made."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    import inlay

    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes, inlay)}
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def load() -> float:
    """The load average of the last minute: other processes."""
    return os.getloadavg()[0]
