"""`benchmarks/gpu.py` in small, so that it does not fall behind the library: few machines can run it in full.

Every line of it but the timing of a GPU runs here, its kernels in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("peft", reason="the rival is not installed")
pytest.importorskip("bitsandbytes", reason="the rival's 4-bit base is not installed")

from inlay.kernels import triton_lora, triton_select

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
VARIANTS = [
    ("lora", "frozen"), ("lora", "full"), ("lora", "inlay"), ("lora", "peft"), ("lora", "peft best"),
    ("qlora", "inlay"), ("qlora", "peft"), ("qlora", "peft best"),
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module. On the CPU it fixes tiles and forms of the kernels, which are put back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(triton_lora, "FP32_TILES", triton_lora.FP32_TILES)
    monkeypatch.setattr(triton_lora, "fastest", triton_lora.fastest)
    yield importlib.import_module("gpu")
    triton_select.forget()


def test_the_page_without_the_steps(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time is left for steps, and the page says so."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--minutes", "0"])
    before = sorted(BENCHMARKS.iterdir())
    gpu.main()
    page = capsys.readouterr().out
    assert sorted(BENCHMARKS.iterdir()) == before
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    errors = [row for row in rows if len(row) == 3 and row[0] not in ("what", "---")]
    assert [ours for what, ours, _ in errors if what.startswith("NF4")] == ["same bits"] * 2
    assert sum(float(ours) <= 2 * float(plain) for _, ours, plain in errors if plain) == len(errors) - 2 == 7
    assert page.split("Not measured")[1].count(";") + 1 == len(gpu.VARIANTS) + 2 * len(gpu.COMPILED) + 1


def test_one_projection(gpu: Any) -> None:
    rows = gpu.layer_forms(64, 48, "cpu", True, 1)
    assert [row[0] for row in rows] == ["16 × 64 → 48", "16 × 64 → 48, dropout 0.05"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:4])


def test_a_page_is_written_as_it_grows(gpu: Any, tmp_path: Path) -> None:
    page = gpu.Page("cpu", True, 0.0)
    page.path = tmp_path / "page.md"
    page.add("Empty", ["a", "b"], [])
    page.add("Steps", ["a", "b"], [["1"]])
    page.more([["2", "3"]])
    text = page.path.read_text()
    assert "Empty" not in text
    assert [line for line in text.splitlines() if line.startswith(("| 1", "| 2"))] == ["| 1 |  |", "| 2 | 3 |"]


@pytest.mark.parametrize(("method", "name"), VARIANTS)
def test_steps_of_a_variant(gpu: Any, method: str, name: str) -> None:
    rows = gpu.model_steps("tiny", gpu.TINY["tiny"], method, name, [8, 16], "cpu", 1, None)
    assert [row[:3] for row in rows] == [["tiny", f"{method} {name}", length] for length in ("8", "16")]
    for row in rows:
        whole, *parts, speed = (float(cell) for cell in row[3:8])
        assert whole > 0
        assert speed > 0
        assert sum(parts) == pytest.approx(whole, abs=0.3)
        assert row[8] == ""  # the peak, of which a CPU says nothing
    assert len(gpu.table(["what"] * 9, rows).splitlines()) == 4


def test_no_variant_is_left_out(gpu: Any) -> None:
    assert {*gpu.VARIANTS, *gpu.COMPILED} <= set(VARIANTS)


def test_compiled_steps(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `torch.compile`; compiling itself would take longer than all other tests of this file."""
    asked = []

    def compiled(model: Any, **options: Any) -> Any:
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    rows = gpu.model_steps("tiny", gpu.TINY["tiny"], "lora", "inlay", [8], "cpu", 1, "reduce-overhead")
    assert [row[1] for row in rows] == ["lora inlay, torch.compile reduce-overhead"]
    assert asked == [{"backend": "aot_eager"}]


def test_running_out_of_memory_is_a_line(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    size = gpu.TINY["tiny"]
    monkeypatch.setattr(gpu.variants.Variant, "step", full)
    rows = gpu.model_steps("tiny", size, "lora", "inlay", [8, 16], "cpu", 1, None)
    assert rows == [["tiny", "lora inlay", "8", "out of memory", "", "", "", ""]]
    monkeypatch.setattr(gpu.variants, "make", full)
    rows = gpu.model_steps("tiny", size, "lora", "inlay", [8, 16], "cpu", 1, None)
    assert rows == [["tiny", "lora inlay", "", "out of memory while made", "", "", "", ""]]
