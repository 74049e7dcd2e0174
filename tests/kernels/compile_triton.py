"""Compiles every Triton kernel for one generation of NVIDIA GPUs (80, 90, ...) and prints what came out, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inlay.kernels import triton_blocks4, triton_cross_entropy, triton_products
from inlay.kernels.triton_products import FP32_TILES, TILES


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: Any
) -> dict[str, int]:
    """Compile one kernel; parameters that `types` does not name are int32.

    Pointers and strides count as multiples of 16, as Triton finds them at run time where the model's sizes are: without
    that nothing is copied asynchronously, and the shared memory comes out too small.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or n in ALIGNED]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "capability": capability,
        "cubin": len(done.asm["cubin"]),
        "shared": done.metadata.shared,
        "fma": done.asm["ptx"].count("fma.rn.f32"),
    }


ALIGNED = ("M", "N", "K", "O", "I", "V", "a_row", "w_sum", "low_row", "up_rank", "out_row", "x_row", "row")
"""The stride `w_column` is 1: the operand of the input gradient as it lies."""


def main() -> None:
    capability, found = int(sys.argv[1]), {}
    for dtype, tiles in (("bf16", TILES), ("fp32", FP32_TILES[:1])):
        pointers = dict.fromkeys(("a", "w", "bias", "low", "up", "out", "x", "A", "s", "ds"), f"*{dtype}")
        types = pointers | {"seed": "*i64", "dA": "*fp32", "scale": "fp32"}
        for tile in tiles:
            constants = {"RANK": 16, "BIAS": True, "MASKED": True, "HOW": "ieee", "w_column": 1, "up_column": 1}
            constants |= {"BM": tile.M, "BN": tile.N, "BK": tile.K, "GROUP": 8}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            name = f"product {dtype} {tile.M}x{tile.N}"
            found[name] = build(triton_products._product, types, constants, capability, **options)
    types = dict.fromkeys(("low", "up", "out", "x", "A", "s", "ds"), "*bf16")
    types |= {"seed": "*i64", "dA": "*fp32", "scale": "fp32"}
    flags = {"RANK": 16, "MASKED": True, "HOW": "ieee"}
    for kernel, blocks in (
        (triton_products._shrink, {"BM": 16, "BI": 128}),
        (triton_products._shrink_grad, {"BM": 64, "BI": 32}),
        (triton_products._add_low_rank, {"BM": 64, "BN": 64}),
    ):
        found[kernel.__name__] = build(kernel, types, flags | blocks, capability, num_warps=4, num_stages=3)
    for nested in (True, False):
        types = dict.fromkeys(("nested", "dynamic", "offset", "book"), "*fp32")
        types |= {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(("x", "bias", "s", "B", "out"), "*bf16")
        stored = {"NESTED": nested, "NESTED_BLOCK": 256, "BLOCK": 64}
        apart = {"enable_fp_fusion": False}
        name, constants = f"dequantize {'nested' if nested else 'plain'}", stored | {"BYTES": 1024}
        found[name] = build(triton_blocks4._dequantize, types, constants, capability, num_warps=8, **apart)
        tile = triton_blocks4.TILES[0] if nested else triton_blocks4.TILES[-1]
        constants = stored | {"RANK": 16, "BIAS": True, "HOW": "ieee", "BM": tile.M, "BO": tile.N, "BI": tile.K}
        options = {"num_warps": tile.warps, "num_stages": tile.stages, **apart}
        name = f"product4 {tile.M}x{tile.N}"
        found[name] = build(triton_blocks4._product4, types, constants, capability, **options)
    types = {"logits": "*bf16", "labels": "*i64", "weights": "*fp32", "losses": "*fp32", "firsts": "*i64"}
    types |= {"smoothing": "fp32"}
    kernel = triton_cross_entropy._cross_entropy
    found["cross entropy"] = build(kernel, types, {"BLOCK": 8192}, capability, num_warps=8)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
