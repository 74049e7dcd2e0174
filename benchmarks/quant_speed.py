"""Speed of the quantised base beside bitsandbytes, interleaved in one process, medians and ratios.

    python benchmarks/quant_speed.py [--threads 1] [--repeats 11] [--sizes 2048 4096] [--rows 64 512]

Three tables: quantising, decoding, and one forward + backward of a linear layer with a LoRA of rank 16 on a 4-bit base
(input gradient and adapter gradients). The last is measured twice, in fresh processes: with the memory allocator as
it comes, and told never to give pages back (mallopt), which spares bitsandbytes the page faults of a fresh dense
weight at every call. The peers of the last table:

    dense            the frozen dense layer alone, forward and backward through it
    peft + bnb       PEFT on Linear4bit as it comes
    peft + bnb best  with adapters in the dtype of the base (autocast_adapter_dtype=False)
    inlay            LoRA on Linear4
    inlay no kernel  the same with INLAY_KERNELS=off
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

Row = dict[str, float]


def interleaved(variants: dict[str, Callable[[], object]], repeats: int) -> Row:
    """Median milliseconds of each variant, called in turn so that drift meets all alike.

    With one thread it is processor time (user and system), which other processes on the machine disturb least; with
    more it is wall time.
    """
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:
        variants[name]()
    for _ in range(repeats):
        for name, call in variants.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def keep_pages() -> None:
    """Tell glibc to serve everything from a heap that never shrinks."""
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 512 << 20)


def quantising(sizes: list[int], repeats: int) -> dict[str, Row]:
    import bitsandbytes.functional as bnb
    import torch

    from inlay.kernels import blocks4
    from inlay.quant.nf4 import NF4_BOOK

    rows = {}
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(size, size) * 0.02).to(dtype)

            rows[f"{size}² {str(dtype)[6:]}"] = interleaved(
                {
                    "bitsandbytes": partial(bnb.quantize_4bit, x, quant_type="nf4"),
                    "inlay": partial(blocks4.quantize, x, NF4_BOOK),
                    "inlay torch": partial(blocks4.quantize, x, NF4_BOOK, path=blocks4.Path.TORCH),
                },
                repeats,
            )
    return rows


def decoding(sizes: list[int], repeats: int) -> dict[str, Row]:
    import bitsandbytes.functional as bnb
    import torch

    from inlay.kernels import blocks4
    from inlay.quant import NF4
    from inlay.quant.model import pack

    rows = {}
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(size, size) * 0.02).to(dtype)
            packed, state = pack(x, NF4())
            data, peer = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
            out = torch.empty_like(x)
            variants: dict[str, Callable[[], object]] = {"bitsandbytes": partial(bnb.dequantize_4bit, data, peer)}
            for path in blocks4.Path:
                if path <= blocks4.best_path():
                    name = f"inlay {path.name.lower()}"
                    variants[name] = partial(blocks4.dequantize, packed, state, out, path)
            rows[f"{size}² {str(dtype)[6:]} nested"] = interleaved(variants, repeats)
            assert torch.equal(out, bnb.dequantize_4bit(data, peer))
    return rows


def layer(size: int, rows: int, dtype_name: str, repeats: int) -> Row:
    import bitsandbytes as bnb
    import peft
    import torch
    from torch import nn

    import inlay
    from inlay.quant import NF4, quantize

    dtype = getattr(torch, dtype_name)
    weight = (torch.randn(size, size) * 0.02).to(dtype)

    class Net(nn.Module):
        def __init__(self, leaf: nn.Module) -> None:
            super().__init__()
            self.proj = leaf

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.proj(x)
            return result

    def dense() -> nn.Linear:
        leaf = nn.Linear(size, size, bias=False, dtype=dtype)
        leaf.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return leaf

    def four_bit() -> nn.Module:
        leaf = bnb.nn.Linear4bit(size, size, bias=False, compute_dtype=dtype, quant_type="nf4")
        leaf.weight = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, module=leaf)
        return leaf.to("cpu")

    def with_peft(autocast: bool) -> Any:
        config = peft.LoraConfig(r=16, target_modules=["proj"])
        net: Any = Net(four_bit())
        model = peft.LoraModel(net, config, "default")
        if not autocast:
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.data = parameter.data.to(dtype)
        return model

    def with_inlay() -> Any:
        net = Net(quantize(nn.Sequential(dense()), NF4())[0])
        inlay.attach(net, inlay.LoRA(rank=16, sites="proj"), name="a")
        return net

    frozen, stock, best, ours = Net(dense()), with_peft(True), with_peft(False), with_inlay()
    x = torch.randn(1, rows, size, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, rows, size, dtype=dtype)

    def step(model: nn.Module) -> None:
        x.grad = None
        model(x).backward(dy)

    def without_kernel() -> None:
        os.environ["INLAY_KERNELS"] = "off"
        step(ours)
        del os.environ["INLAY_KERNELS"]

    return interleaved(
        {
            "dense": lambda: step(frozen),
            "peft + bnb": lambda: step(stock),
            "peft + bnb best": lambda: step(best),
            "inlay": lambda: step(ours),
            "inlay no kernel": without_kernel,
        },
        repeats,
    )


def layers(arguments: argparse.Namespace, pages_kept: bool) -> dict[str, Row]:
    """The layer table from a fresh process."""
    command = [sys.executable, __file__, "--child", "--threads", str(arguments.threads)]
    command += ["--repeats", str(arguments.repeats), "--sizes", *map(str, arguments.sizes)]
    command += ["--rows", *map(str, arguments.rows), *(["--keep-pages"] if pages_kept else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Row] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(arguments: argparse.Namespace) -> None:
    if arguments.keep_pages:
        keep_pages()
    rows = {}
    for dtype in ("float32", "bfloat16"):
        for size in arguments.sizes:
            for count in arguments.rows:
                rows[f"{count} × {size}² {dtype}"] = layer(size, count, dtype, arguments.repeats)
    print(json.dumps(rows))


def show(title: str, rows: dict[str, Row], base: str) -> None:
    names = list(next(iter(rows.values())))
    print(f"\n### {title}\n\n| ms (× {base}) | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|")
    for label, row in rows.items():
        cells = [f"{row[n]:.2f}" + ("" if n == base else f" ({row[n] / row[base]:.2f})") for n in names]
        print(f"| {label} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep-pages", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.child:
        child(arguments)
        return
    from inlay.kernels import blocks4

    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), best form {blocks4.best_path().name.lower()}",
        end="",
    )
    print(f", load average {load:.1f}, median of {arguments.repeats}")
    show("Quantising", quantising(arguments.sizes, arguments.repeats), "bitsandbytes")
    show("Decoding", decoding(arguments.sizes, arguments.repeats), "bitsandbytes")
    show("LoRA layer, allocator as it comes", layers(arguments, False), "peft + bnb")
    show("LoRA layer, pages kept (mallopt)", layers(arguments, True), "peft + bnb")


if __name__ == "__main__":
    main()
