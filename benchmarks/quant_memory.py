"""Peak memory of quantising while loading, in a fresh process on a generated checkpoint.

    python benchmarks/quant_memory.py [--layers 16] [--hidden 1024] [--dtype bfloat16] [--shard 200MB]

The claim: peak RSS ≤ 1.15 × the quantised model + the largest tensor + a fixed overhead. The overhead is what the
process needs before any weight is read: RSS after a checkpoint of a few kilobytes went through the same code. For
comparison the same is measured for `from_pretrained` followed by `inlay.quantize`, and for transformers with
bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WAYS = ("load_quantized", "from_pretrained + quantize", "transformers + bitsandbytes")
MIB = 1 << 20


def write_checkpoint(folder: Path, layers: int, hidden: int, dtype: str, shard: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        vocab_size=32000 if hidden >= 512 else 64,
        dtype=dtype,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)


def current_rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def child(way: str, tiny: str, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import inlay.quant

    def load(path: str) -> Any:
        if way == WAYS[0]:
            return inlay.quant.load_quantized(path, AutoModelForCausalLM, inlay.quant.NF4())
        if way == WAYS[1]:
            return inlay.quant.quantize(AutoModelForCausalLM.from_pretrained(path), inlay.quant.NF4())
        bnb = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=bnb)

    del_me = load(tiny)
    del del_me
    fixed = current_rss()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    model = load(folder)
    peak = peak_rss()
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    print(json.dumps({"fixed": fixed, "peak": peak, "quantised": sum(sizes.values())}))


def largest_tensor(folder: Path) -> int:
    from safetensors import safe_open

    largest = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_slice(key)
                count = 1
                for extent in tensor.get_shape():
                    count *= extent
                largest = max(largest, count * (4 if tensor.get_dtype() == "F32" else 2))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shard", default="200MB")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "TINY", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as root:
        tiny, folder = Path(root) / "tiny", Path(root) / "model"
        write_checkpoint(tiny, 1, 64, arguments.dtype, arguments.shard)
        write_checkpoint(folder, arguments.layers, arguments.hidden, arguments.dtype, arguments.shard)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        largest = largest_tensor(folder)
        print(f"checkpoint {size / MIB:.0f} MiB {arguments.dtype}, largest tensor {largest / MIB:.0f} MiB")
        print(f"{'way':30} {'quantised':>10} {'fixed':>7} {'peak':>7} {'allowed':>8}  above fixed / allowed")
        for way in WAYS:
            command = [sys.executable, __file__, "--child", way, str(tiny), str(folder)]
            environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            found = json.loads(out.splitlines()[-1])
            allowed = 1.15 * found["quantised"] + largest
            used = found["peak"] - found["fixed"]
            row = [found["quantised"], found["fixed"], found["peak"], allowed + found["fixed"]]
            numbers = " ".join(f"{value / MIB:>{width}.0f}" for value, width in zip(row, (10, 7, 7, 8), strict=True))
            print(f"{way:30} {numbers}  {used / allowed:.2f} {'ok' if used <= allowed else 'MORE'}")


if __name__ == "__main__":
    main()
