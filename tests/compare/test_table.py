"""Rows of the table from records whose numbers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest

from inlay.compare import figures
from inlay.compare.cell import Record
from inlay.compare.table import findings, markdown, rows_of


def record(label: str, seed: int, value: float, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "label": label, "key": label.lower(), "size": None, "seed": seed, "config": {}, "metric": "accuracy",
        "quality": {"accuracy": value}, "batch": 8, "rows": 500, "trained": 1000, "stored": 900, "base": 10_000,
        "bytes": 4000, "step_seconds": [0.1, 0.2, 0.3], "curve": [(0, 0.1), (5, value)],
        "inference": {
            "batch 16": {"base": 10.0, "unmerged": 1.2, "merged": 1.0},
            "one row": {"base": 1.0, "unmerged": 3.0},
        },
        "peak_bytes": 2_000_000,
    }  # fmt: skip
    return Record(**(values | changes))


FULL = [record("Full", s, v, step_seconds=[0.2, 0.4, 0.5]) for s, v in ((1, 0.80), (2, 0.84))]
LORA = [record("LoRA", s, v) for s, v in ((1, 0.90), (2, 0.80))]


def test_seeds_are_averaged_with_the_sample_deviation():
    lora, full = rows_of([*FULL, *LORA])
    assert (lora.label, full.label) == ("LoRA", "Full")
    assert lora.quality == pytest.approx(0.85)
    assert lora.spread == pytest.approx(math.sqrt(2) * 0.05)
    assert rows_of(LORA[:1])[0].spread is None


def test_training_time_is_the_median_of_ratios_on_the_same_batches():
    """Medians apart would give 0.2 / 0.4 = 50 %; step by step the ratios are 0.5, 0.5 and 0.6."""
    ours = [record("LoRA", 1, 0.9, step_seconds=[0.1, 0.2, 0.3])]
    theirs = [record("Full", 1, 0.8, step_seconds=[0.2, 0.4, 0.5])]
    assert rows_of([*ours, *theirs])[0].time == pytest.approx(0.5)
    spiked = [record("Full", 1, 0.8, step_seconds=[0.2, 4.0, 0.5])]
    assert rows_of([*ours, *spiked])[0].time == pytest.approx(0.5)
    uneven = [record("LoRA", 1, 0.9, step_seconds=[0.1, 0.1, 0.1], batch=4)]
    assert rows_of([*uneven, *theirs])[0].time == pytest.approx((0.1 / 4) / (0.4 / 8))
    assert rows_of(ours)[0].time is None


def test_inference_is_relative_to_the_base_and_absent_where_it_cannot_be_merged():
    row = rows_of(LORA)[0]
    assert row.inference == {
        "batch 16": {"unmerged": pytest.approx(1.2), "merged": pytest.approx(1.0)},
        "one row": {"unmerged": pytest.approx(3.0)},
    }


def test_a_lower_loss_is_better():
    rows = rows_of([record(n, 1, v, metric="loss", quality={"loss": v}) for n, v in (("A", 2.0), ("B", 1.0))])
    assert [row.label for row in rows] == ["B", "A"]


def test_little_data_has_its_own_means():
    low = [record("LoRA", s, v, size=100) for s, v in ((1, 0.5), (2, 0.6))]
    row = rows_of([*LORA, *low])[0]
    assert {count: mean for count, (mean, _) in row.low.items()} == {100: pytest.approx(0.55), 500: pytest.approx(0.85)}
    assert row.quality == pytest.approx(0.85)
    assert "| LoRA | 0.550 ± 0.071 | 0.850 ± 0.071 |" in markdown([row])


def test_a_method_that_failed_is_told_last_and_with_its_reason():
    failed = [Record("BitFit", "bitfit", None, s, {}, error="the model has no biases") for s in (1, 2)]
    rows = rows_of([*failed, *FULL])
    assert [row.label for row in rows] == ["Full", "BitFit"]
    assert "BitFit: the model has no biases" in markdown(rows)
    assert "| BitFit | not possible | – |" in markdown(rows)


def test_findings_name_the_best_those_as_good_and_those_above_full_fine_tuning():
    near = [record("IA3", s, 0.84, bytes=100, stored=10) for s in (1, 2)]
    far = [record("Prompt", s, 0.3) for s in (1, 2)]
    told = " ".join(findings(rows_of([*FULL, *LORA, *near, *far])))
    assert "Best accuracy: LoRA, 0.850 ± 0.071." in told
    assert "Within one standard deviation of it: IA3, Full." in told
    assert "The smallest of these is IA3 with 100 B." in told
    assert "2 of the 3 methods are above full fine-tuning (0.820 ± 0.028): LoRA, IA3." in told


def test_figures_are_svg_in_the_colours_of_the_page():
    low = [record("LoRA", s, v, size=100) for s, v in ((1, 0.5), (2, 0.6))]
    rows = rows_of([*FULL, *LORA, *low])
    drawn = [figures.quality(rows), figures.curves(rows), figures.low_data(rows), figures.times(rows)]
    for svg in drawn:
        assert svg.startswith("<svg ")
        assert "var(--ink)" in svg
        assert not any(colour in svg for colour in (figures.INK, figures.GRID, figures.GHOST))
        assert ">LoRA<" in svg
    ids = [{part.split('"')[0] for part in svg.split(' id="')[1:]} for svg in drawn]
    assert all(not a & b for i, a in enumerate(ids) for b in ids[i + 1 :])
    assert figures.low_data(rows_of(FULL)) == ""
