"""Speed of the quantised base beside bitsandbytes, interleaved in one process, medians and ratios.

    python benchmarks/quant_speed.py [--tables quantise decode product layer kept] [--threads 1] [--repeats 11]
                                     [--sizes 2048 4096] [--rows 64 512]

Tables: quantising; decoding; one product with a 4-bit weight, decoded first or in pieces while it is multiplied; one
forward + backward of a linear layer with a LoRA of rank 16 on a 4-bit base (input gradient and adapter gradients). The
last is measured in fresh processes, with the memory allocator as it comes (`layer`) or told never to give pages back
(`kept`), which spares bitsandbytes the page faults of a fresh dense weight at every call. Its columns:

    dense            the frozen dense layer alone, forward and backward through it
    peft + bnb       PEFT on Linear4bit as it comes
    peft + bnb best  with adapters in the dtype of the base (autocast_adapter_dtype=False)
    inlay            LoRA on Linear4
    inlay no kernel  the same with INLAY_KERNELS=off
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import measure

Row = dict[str, float]


def medians(variants: dict[str, Callable[[], object]], repeats: int) -> Row:
    """Median milliseconds of each variant, called in turn."""
    return {name: figures["median"] for name, figures in measure.in_turn(variants, repeats).items()}


def quantising(sizes: list[int], repeats: int) -> dict[str, Row]:
    import bitsandbytes.functional as bnb
    import torch

    from inlay.kernels import blocks4
    from inlay.quant.nf4 import NF4_BOOK

    rows = {}
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(size, size) * 0.02).to(dtype)

            rows[f"{size}² {str(dtype)[6:]}"] = medians(
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
            rows[f"{size}² {str(dtype)[6:]} nested"] = medians(variants, repeats)
            assert torch.equal(out, bnb.dequantize_4bit(data, peer))
    return rows


def products(sizes: list[int], counts: list[int], repeats: int) -> dict[str, Row]:
    """x Wᵀ and dy W: the dense product, decoding and multiplying, and the fused forms."""
    import torch

    from inlay.kernels import blocks4, blocks4_product
    from inlay.quant import NF4
    from inlay.quant.model import pack

    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = blocks4_product.best_form(dtype)
        forms = [form for form in blocks4_product.Form if best is not None and form <= best]
        for size in sizes:
            for count in counts:
                packed, state = pack((torch.randn(size, size) * 0.02).to(dtype), NF4())
                w_OI = blocks4.dequantize(packed, state, torch.empty(size, size, dtype=dtype))
                a_MK = torch.randn(count, size).to(dtype)

                def two_steps(a_MK: Any = a_MK, packed: Any = packed, state: Any = state, w_OI: Any = w_OI) -> Any:
                    w = blocks4.dequantize(packed, state, w_OI)
                    return torch.nn.functional.linear(a_MK, w), a_MK @ w

                def fused(form: Any, a_MK: Any = a_MK, packed: Any = packed, state: Any = state) -> Any:
                    both = (False, True)
                    return [blocks4_product.product(a_MK, packed, state, None, way, form) for way in both]

                def dense(a_MK: Any = a_MK, w_OI: Any = w_OI) -> Any:
                    return torch.nn.functional.linear(a_MK, w_OI), a_MK @ w_OI

                variants: dict[str, Callable[[], object]] = {"decoded first, once": two_steps, "dense": dense}
                variants |= {f"fused {form.name.lower()}": partial(fused, form) for form in forms}
                rows[f"{count} × {size}² {str(dtype)[6:]}, x Wᵀ and dy W"] = medians(variants, repeats)
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

    return medians(
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
    command += ["--rows", *map(str, arguments.rows)]
    environment = os.environ | (measure.KEEP_PAGES if pages_kept else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Row] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(arguments: argparse.Namespace) -> None:
    """Measures the layer table and prints it as JSON."""
    print(
        json.dumps(
            {
                f"{count} × {size}² {dtype}": layer(size, count, dtype, arguments.repeats)
                for dtype in ("float32", "bfloat16")
                for size in arguments.sizes
                for count in arguments.rows
            }
        )
    )


def show(title: str, rows: dict[str, Row], base: str) -> None:
    """Prints a table with the ratio to `base` in brackets; rows may have more columns than others."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\n### {title}\n\n| ms (× {base}) | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for label, row in rows.items():
        ratios = {n: "" if n == base else f" ({row[n] / row[base]:.2f})" for n in row}
        print(f"| {label} | " + " | ".join(f"{row[n]:.2f}{ratios[n]}" if n in row else "" for n in names) + " |")


def main() -> None:
    """Prints the tables that were asked for."""
    tables = ("quantise", "decode", "product", "layer", "kept")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.child:
        child(arguments)
        return
    from inlay.kernels import blocks4, blocks4_product

    best = [blocks4_product.best_form(dtype) for dtype in (torch.float32, torch.bfloat16)]
    forms = ", ".join("none" if form is None else form.name.lower() for form in best)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), decoding {blocks4.best_path().name.lower()}, "
        f"products in fp32 and bf16: {forms}, load average {os.getloadavg()[0]:.1f}, median of {arguments.repeats}"
    )
    sizes, rows, repeats = arguments.sizes, arguments.rows, arguments.repeats
    if "quantise" in arguments.tables:
        show("Quantising", quantising(sizes, repeats), "bitsandbytes")
    if "decode" in arguments.tables:
        show("Decoding", decoding(sizes, repeats), "bitsandbytes")
    if "product" in arguments.tables:
        show("Products", products(sizes, rows, repeats), "decoded first, once")
    if "layer" in arguments.tables:
        show("LoRA layer, allocator as it comes", layers(arguments, False), "peft + bnb")
    if "kept" in arguments.tables:
        show("LoRA layer, pages kept (mallopt)", layers(arguments, True), "peft + bnb")


if __name__ == "__main__":
    main()
