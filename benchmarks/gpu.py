"""inlay on one NVIDIA GPU: correctness in bf16, the forms of a LoRA layer, step time and peak memory beside PEFT.

    python benchmarks/gpu.py                       # under ten minutes; writes benchmarks/gpu-<date>-<gpu>.md
    python benchmarks/gpu.py --device cpu --tiny   # every line of this file, on a machine without a GPU; writes nothing

Models have the shapes of Llama 3.2 1B and Llama 3.1 8B and random weights. One model is on the GPU at a time, so that
its peak memory is its own; a step is the median of `--steps` after three. PEFT runs as it comes and with its adapters in
bf16, on bf16 weights and on those of bitsandbytes (NF4, double quantisation). Kernels run through Triton's interpreter
where there is no GPU, in fp16 since it cannot multiply bf16.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
import variants
from report import table
from torch import Tensor
from variants import Size

from inlay.kernels import blocks4, triton_select
from inlay.quant import NF4
from inlay.quant.base import QuantState
from inlay.quant.model import pack

SHAPES = {
    "1B": Size(2048, 8192, 16, 32, 8, 128256, 1, 512),
    "8B": Size(4096, 14336, 32, 32, 8, 128256, 1, 512),
}
TINY = {"tiny": Size(64, 128, 2, 4, 2, 256, 1, 16)}
PROJECTIONS = [(2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096)]
GIB = 1 << 30
VARIANTS = (
    ("lora", "inlay"),
    ("lora", "peft"),
    ("lora", "peft best"),
    ("qlora", "inlay"),
    ("qlora", "peft"),
    ("qlora", "peft best"),
    ("lora", "frozen"),
    ("lora", "full"),
)
COMPILED = (("lora", "inlay"), ("lora", "peft best"))


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def correctness(device: str, tiny: bool) -> list[list[str]]:
    """Each kernel beside the same in fp64: its error, and that of torch's own operations in the same dtype."""
    from inlay.kernels import triton_blocks4, triton_cross_entropy, triton_products
    from inlay.kernels.philox import draw_seed, keep_mask
    from inlay.kernels.triton_products import Mask

    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    M, I, O, R, p = (24, 64, 48, 8, 0.3) if tiny else (1000, 4096, 1024, 16, 0.3)
    tile = triton_products.Tile(16, 32, 32, 4, 1) if tiny else triton_products.TILES[1]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    x, w, A, B = normal(M, I), normal(O, I, scale=I**-0.5), normal(R, I, scale=I**-0.5), normal(O, R)
    s, dy, ds = normal(M, R), normal(M, O), normal(M, R)
    mask = Mask(draw_seed(torch.device(device)), p)
    keep = keep_mask(mask.seed, M, I, p)
    scale = 1 / (1 - p)
    d = torch.float64
    rows: list[list[str]] = []

    def compare(what: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        rows.append([what, f"{relative(ours, exact):.1e}", f"{relative(plain, exact):.1e}"])

    compare(
        "x Wᵀ + s Bᵀ",
        triton_products.product(x, w.mT, None, s, B.mT, 2.0, tile=tile),
        x @ w.mT + 2 * (s @ B.mT),
        x.to(d) @ w.to(d).mT + 2 * (s.to(d) @ B.to(d).mT),
    )
    compare(
        "dy W + keep ∘ (ds A)",
        triton_products.product(dy, w, None, ds, A, scale, mask, tile),
        dy @ w + scale * (keep * (ds @ A)),
        dy.to(d) @ w.to(d) + scale * keep * (ds.to(d) @ A.to(d)),
    )
    compare(
        "drop(x) Aᵀ",
        triton_products.shrink(x, A, scale, mask, features=32 if tiny else 128),
        (scale * keep * x).to(dtype) @ A.mT,
        (scale * keep * x.to(d)) @ A.to(d).mT,
    )
    compare(
        "dsᵀ drop(x)",
        triton_products.shrink_grad(ds, x, scale, mask, rows=16 if tiny else 64),
        ds.mT @ (scale * keep * x).to(dtype),
        ds.to(d).mT @ (scale * keep * x.to(d)),
    )
    packed, state = pack(w.float(), NF4())
    ours = triton_blocks4.dequantize(packed, state, torch.empty(O, I, dtype=torch.float32, device=device))
    plain = blocks4.dequantize(packed, state, torch.empty_like(ours), blocks4.Path.TORCH)
    rows.append(["NF4 decoded in fp32", "same bits" if torch.equal(ours, plain) else "**other bits**", ""])
    rows.append(["NF4 decoded by what is faster here", _by_default(packed, state, plain), ""])
    from inlay.quant.product import Packed

    nested = state.nested
    assert nested is not None
    parts = Packed(packed, state.absmax, nested.absmax, nested.offset, "nf4", state.block_size, O, I)
    few = triton_blocks4.Tile(16, 32, 64, 4, 1) if tiny else triton_blocks4.TILES[0]
    compare(
        "x NF4(W)ᵀ, decoded in the product",
        triton_blocks4.product4(x[:16], parts, None, s[:16], B, 2.0, few),
        x[:16] @ plain.to(dtype).mT + 2 * (s[:16] @ B.mT),
        x[:16].to(d) @ plain.to(d).mT + 2 * (s[:16].to(d) @ B.to(d).mT),
    )
    V = 300 if tiny else 128256
    logits, labels = normal(64, V), torch.randint(0, V, (64,), device=device)
    z = logits.to(d).requires_grad_()
    exact = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    exact.sum().backward()
    chunks = logits.clone(), logits.clone()
    ones = torch.ones(64, device=device)
    losses = triton_cross_entropy.cross_entropy_(chunks[0], labels, ones)[0]
    losses_plain = triton_cross_entropy.cross_entropy_plain_(chunks[1], labels, ones)[0]
    compare("cross-entropy", losses, losses_plain, exact.detach())
    assert z.grad is not None
    compare("its gradient", chunks[0], chunks[1], z.grad)
    return rows


def _by_default(packed: Tensor, state: QuantState, plain: Tensor) -> str:
    """Bits of the form that layers take, the kernel of bitsandbytes or ours, and which it was."""
    found = blocks4.dequantize(packed, state, torch.empty_like(plain))
    chosen = [
        form for key, form in triton_select._fastest.items() if isinstance(key, tuple) and key[0] == "dequantize4"
    ]
    which = f" (form {chosen[-1]}; 0: bitsandbytes)" if chosen else ""
    return ("same bits" if torch.equal(found, plain) else f"error {relative(found, plain):.1e}") + which


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, waiting for the device each time."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def wait(device: str) -> None:
    """Waits until the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def layer_forms(I: int, O: int, device: str, tiny: bool, steps: int) -> list[list[str]]:
    """One projection with LoRA, forward and backward: the frozen layer, torch's operations, ours with the form chosen."""
    from inlay.kernels import triton_lora, triton_products

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if device == "cpu":
        triton_lora.FP32_TILES = (triton_products.Tile(16, 32, 32, 4, 1),)
        triton_lora.fastest = lambda key, candidates: candidates[1]()
    rows = []
    for M in (16,) if tiny else (512, 2048, 8192):
        for p in (0.0, 0.05):
            x = torch.randn(M, I, device=device).to(dtype).requires_grad_()
            dy = torch.randn(M, O, device=device).to(dtype)
            w = (torch.randn(O, I, device=device) * I**-0.5).to(dtype)
            A = (torch.randn(16, I, device=device) * I**-0.5).requires_grad_()
            B = torch.randn(O, 16, device=device).requires_grad_()

            def frozen(x: Tensor = x, w: Tensor = w, dy: Tensor = dy) -> None:
                torch.nn.functional.linear(x, w).backward(dy)

            def plain(
                x: Tensor = x, w: Tensor = w, A: Tensor = A, B: Tensor = B, dy: Tensor = dy, p: float = p
            ) -> None:
                linear = torch.nn.functional.linear
                dropped = torch.nn.functional.dropout(x, p) if p else x
                added = linear(linear(dropped, A.to(x.dtype)), B.to(x.dtype))
                (linear(x, w) + 2.0 * added).backward(dy)

            def ours(x: Tensor = x, w: Tensor = w, A: Tensor = A, B: Tensor = B, dy: Tensor = dy, p: float = p) -> None:
                triton_lora.lora_linear(x, w, None, A, B, 2.0, p).backward(dy)

            times = [milliseconds(call, device, steps) for call in (frozen, plain, ours)]
            chosen = [f"{k[0]} {form}" for k, form in triton_select._fastest.items() if k[2] in (I, O)][-2:]
            label = f"{M} × {I} → {O}" + (f", dropout {p}" if p else "")
            rows.append([label, *(f"{t:.3f}" for t in times), f"{times[2] / times[1]:.2f}", ", ".join(chosen)])
    return rows


def model_steps(
    shape: str, size: Size, method: str, name: str, lengths: list[int], device: str, steps: int, mode: str | None
) -> list[list[str]]:
    """Step time and peak memory of one variant at each length; a line that says so where memory runs out."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = []
    label = f"{method} {name}" + (f", torch.compile {mode}" if mode else "")
    try:
        variant = variants.make(name, method, size, dtype, device=device)
        if mode is not None:
            backend: dict[str, Any] = {"backend": "aot_eager"} if device == "cpu" else {"mode": mode}
            variant.model = torch.compile(variant.model, **backend)
    except torch.OutOfMemoryError:
        return [[shape, label, "", "out of memory while made", "", "", "", ""]]
    for length in lengths:
        if name == "frozen":
            ids = variants.batch_of(replace(size, length=length), device)["input_ids"]
            embeds = variant.model.get_input_embeddings()(ids).detach().requires_grad_()
            variant.batch = {"inputs_embeds": embeds, "labels": ids}
        else:
            variant.batch = variants.batch_of(replace(size, length=length), device)
        variant.split.clear()
        try:
            for _ in range(3):
                variant.step()
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            variant.split.clear()
            for _ in range(steps):
                variant.step()
        except torch.OutOfMemoryError:
            rows.append([shape, label, str(length), "out of memory", "", "", "", ""])
            break
        whole = [sum(t) for t in zip(*variant.split.values(), strict=True)]
        parts = [f"{statistics.median(t):.1f}" for t in variant.split.values()]
        peak = f"{torch.cuda.max_memory_allocated() / GIB:.2f}" if device != "cpu" else ""
        middle = statistics.median(whole)
        rows.append([shape, label, str(length), f"{middle:.1f}", *parts, f"{length / middle * 1e3:.0f}", peak])
    del variant
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes at which an interpreter is quick enough")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing more after this long, and say so")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu goes with --tiny: an interpreter runs the kernels there")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny runs every line of this file without one")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device, tiny = options.device, options.tiny
    shapes = TINY if tiny else {name: SHAPES[name] for name in options.shapes}
    lengths, steps = ([16, 32], 1) if tiny else (options.lengths, options.steps)
    page = Page(device, tiny, time.monotonic() + 60 * options.minutes)
    page.add("Error beside fp64, ours and torch's", ["what", "ours", "torch"], correctness(device, tiny))
    small = next(iter(shapes))
    plan = [(shape, *pair, lengths, None) for shape in shapes for pair in VARIANTS]
    plan += [(small, *pair, lengths[1:2], mode) for mode in ("default", "reduce-overhead") for pair in COMPILED]
    head = ["model", "variant", "tokens", "step, ms", "forward", "backward", "optimizer", "tokens/s", "peak, GiB"]
    page.add("Training steps, one row", head, [])
    for shape, method, name, some, mode in plan:
        if page.in_time(f"{shape} {method} {name} {mode or ''}".strip()):
            page.more(model_steps(shape, shapes[shape], method, name, some, device, steps, mode))
    head = ["projection", "frozen, ms", "torch LoRA, ms", "ours, ms", "ours / torch", "forms chosen (0: plain)"]
    page.add("One projection, forward and backward", head, [])
    for I, O in [(64, 48)] if tiny else PROJECTIONS:
        if page.in_time(f"projection {I} → {O}"):
            page.more(layer_forms(I, O, device, tiny, steps))
    print(page.text())


class Page:
    """What was measured so far: written after each part, so that an interrupted run leaves what it had."""

    def __init__(self, device: str, tiny: bool, until: float) -> None:
        gpu = "interpreter on the CPU" if device == "cpu" else torch.cuda.get_device_name()
        about = f"{gpu}, torch {torch.__version__}, {'fp32' if device == 'cpu' else 'bf16'}"
        self.head = f"# On a GPU, {date.today()}\n\n{about}. Command: `python benchmarks/gpu.py`.\n"
        self.parts: list[tuple[str, list[str], list[list[str]]]] = []
        self.until, self.skipped = until, list[str]()
        name = f"gpu-{date.today()}-{gpu.lower().replace(' ', '-')}.md"
        self.path = None if tiny else Path(__file__).with_name(name)

    def add(self, title: str, head: list[str], rows: list[list[str]]) -> None:
        """Begin a table."""
        self.parts.append((title, head, []))
        self.more(rows)

    def more(self, rows: list[list[str]]) -> None:
        """Rows of the last table; short ones are filled up."""
        _, head, known = self.parts[-1]
        known += [row + [""] * (len(head) - len(row)) for row in rows]
        for row in rows:
            print(*row, sep="  ", file=sys.stderr, flush=True)
        if self.path is not None:
            self.path.write_text(self.text())

    def in_time(self, what: str) -> bool:
        """Whether there is time for this; what there was none for is named on the page."""
        if time.monotonic() < self.until:
            return True
        self.skipped.append(what)
        return False

    def text(self) -> str:
        """The page in Markdown."""
        tables = [f"## {title}\n\n{table(head, rows)}" for title, head, rows in self.parts if rows]
        left = [f"Not measured, for want of time: {'; '.join(self.skipped)}.\n"] if self.skipped else []
        return "\n".join([self.head, *tables, *left])


if __name__ == "__main__":
    main()
