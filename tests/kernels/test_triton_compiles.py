"""Every Triton kernel compiles for NVIDIA GPUs, down to machine code, on a machine that has none.

The interpreter runs kernels as numpy would; types, layouts and shared memory are checked by the compiler only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that one block can have


def compiled(capability: int, cache: Path) -> dict[str, dict[str, int]]:
    """What the compiler says of each kernel; from a fresh process, where the interpreter was never asked for."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(Path(__file__).with_name("compile_triton.py")), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.torture
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_becomes_machine_code_that_fits(capability: int, tmp_path: Path) -> None:
    found = compiled(capability, tmp_path)
    assert len(found) == 12
    for name, kernel in found.items():
        assert kernel["cubin"] > 0, name
        assert kernel["shared"] <= SHARED[capability], name
    # Decoded weights have the bits of the plain form only where products and sums are rounded one by one.
    assert found["dequantize nested"]["fma"] == 0
