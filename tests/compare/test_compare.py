"""A whole comparison of a tiny model: what it leaves behind, what it keeps when it is interrupted, what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from inlay import cli
from inlay.compare import Comparison, Plan, compare, costs
from inlay.compare import together as alone_and_together
from inlay.compare.cell import differences
from inlay.compare.plan import template_of, variants_of
from inlay.errors import ConfigError
from inlay.sweep import together
from inlay.train import report
from inlay.train.checkpoint import Interrupted
from inlay.train.defaults import TABLE
from inlay.train.loop import Loop
from train.worlds import data_file, model_folder

WORDS = ["bf16=false", "per_device_train_batch_size=8", "eval_steps=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    model_folder(folder / "bert", "bert")
    model_folder(folder / "llama", "llama")
    data_file(folder / "labelled.jsonl", "labelled")
    data_file(folder / "prompted.jsonl", "prompted")
    return folder


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alone_and_together, "STEPS", 2)
    monkeypatch.setattr(costs, "SECONDS", 0.0)
    monkeypatch.setattr(costs, "ROUNDS", (1, 1))
    monkeypatch.setattr(costs, "NEW_TOKENS", 2)
    monkeypatch.setattr(report, "plot", lambda run, metric: None)  # nothing here looks at a run's own picture


def plan(world: Path, output: Path, methods: str = "lora,full", words: Any = (), **changes: Any) -> Plan:
    flags = {"model": str(world / "bert"), "data": str(world / "labelled.jsonl"), "max_steps": 4}
    values = {"template": template_of([*WORDS, *words], flags), "variants": variants_of(methods), "seeds": (1,)}
    return Plan(**(values | {"output": output} | changes))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    output = tmp_path_factory.mktemp("out") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "SECONDS", 0.0)
        patch.setattr(costs, "ROUNDS", (1, 1))
        patch.setattr(report, "plot", lambda run, metric: None)
        patch.setenv("INLAY_CACHE", str(output.parent / "cache"))
        return compare(plan(world, output, sizes=(None, 12)), quiet=True)


def test_every_cell_is_one_file_and_nothing_else_is_left(finished):
    output = finished.plan.output
    names = sorted(path.stem for path in (output / "cells").iterdir())
    assert names == sorted(f"{m}_{size}_1" for m in ("lora", "full") for size in ("all", "12"))
    assert not list((output / "work").iterdir())
    present = {"report.html", "report.md", "quality.png", "comparison.json"}
    assert present <= {path.name for path in output.iterdir()}


def test_what_is_measured_is_there(finished):
    lora = next(r for r in finished.records if r.label == "LoRA" and r.size is None)
    full = next(r for r in finished.records if r.label == "Full" and r.size is None)
    assert 0 <= lora.value <= 1
    assert [step for step, _ in lora.curve] == [0, 2, 4]
    assert lora.curve[-1][1] == lora.value
    assert lora.untouched["accuracy"] == lora.curve[0][1]
    assert len(lora.step_seconds) == lora.steps == 4
    assert all(seconds > 0 for seconds in lora.step_seconds)
    assert lora.trained < full.trained
    assert lora.bytes < full.bytes
    assert lora.head == 99
    assert set(lora.inference["batch 6"]) == {"base", "unmerged", "merged"}
    assert all(value > 0 for value in lora.inference["batch 6"].values())
    assert lora.source == "arXiv:2106.09685"
    if Path("/proc/self/clear_refs").exists() and lora.peak_bytes is not None:
        assert 0 <= lora.peak_bytes < 2**34


def test_small_samples_are_measured_on_the_same_held_out_rows(finished):
    sizes = {(r.size, r.rows, r.held_out) for r in finished.records}
    assert sizes == {(None, 54, 6), (12, 12, 6)}
    folder = finished.plan.output / "data"
    train, held_out = ((folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test"))
    assert sorted(train + held_out) == sorted((Path(finished.plan.template.data)).read_text().splitlines())


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(finished):
    text = (finished.plan.output / "report.html").read_text()
    open_tags: list[str] = []
    asked: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            asked.extend(v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#"))
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            asked.extend(v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#"))

    Reader().feed(text)
    assert not open_tags
    assert not asked
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert text.count("<svg ") == 4
    for part in ("LoRA", "arXiv:2106.09685", "12 rows", "54 rows", "Learning curves", "prefers-color-scheme: dark"):
        assert part in text


def test_the_same_call_again_runs_nothing_and_more_methods_run_only_those(finished, monkeypatch, world):
    output = finished.plan.output
    before = {path.name: path.stat().st_mtime_ns for path in (output / "cells").iterdir()}
    told = io.StringIO()
    again = plan(world, output, "lora,full,ia3", sizes=(None, 12))
    compare(again, console=Console(file=told, width=200))
    after = {path.name: path.stat().st_mtime_ns for path in (output / "cells").iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"ia3_all_1.json", "ia3_12_1.json"}
    assert "6 runs of 4 steps, 4 of them finished before" in told.getvalue()


def test_other_settings_in_the_same_folder_are_refused(finished, world, monkeypatch):
    with pytest.raises(ConfigError, match=r"another comparison \(max_length was None, is 16\)"):
        compare(plan(world, finished.plan.output, words=["max_length=16"]), quiet=True)
    from inlay.compare.plan import Variant

    other = plan(
        world, finished.plan.output, variants=(Variant("LoRA", {"name": "lora", "rank": 2}),), sizes=(None, 12)
    )
    with pytest.raises(ConfigError, match="lora_all_1 as run with other settings"):
        compare(other, quiet=True)
    with monkeypatch.context() as patch:
        patch.setitem(TABLE, "lora", TABLE["full"])
        with pytest.raises(ConfigError, match=r"the default learning_rate was 0\.002, is 0\.0001"):
            compare(plan(world, finished.plan.output, sizes=(None, 12)), quiet=True)


def test_a_setting_that_is_new_since_a_run_has_its_default(finished):
    record = finished.records[0]
    config = finished.plan.config(next(finished.plan.cells()), record.config["data"])
    assert differences({k: v for k, v in record.config.items() if k != "fp16"}, config) == ""
    assert differences(record.config | {"fp16": True}, config) == "fp16 was True, is False"
    assert differences(record.config | {"gone": 1}, config) == "gone was 1, is None"


def test_a_folder_that_holds_other_things_is_refused(world, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds no comparison"):
        compare(plan(world, tmp_path / "full"), quiet=True)


def test_interrupted_it_goes_on_in_the_middle_of_a_run_with_the_same_result(world, tmp_path, monkeypatch):
    methods = "ia3,bitfit"
    straight = compare(plan(world, tmp_path / "straight", methods, inference=False), quiet=True)
    real = Loop._step

    def stepping(self: Loop, group: Any) -> tuple[float, float]:
        if self.state.step == 2 and "bitfit" in str(self.run):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stepping)
        with pytest.raises(Interrupted, match=r"bitfit_all_1: .*checkpoint-3 is complete") as stopped:
            compare(plan(world, tmp_path / "c", methods, inference=False), quiet=True)
    assert stopped.value.exit_code == 143
    assert [path.stem for path in (tmp_path / "c" / "cells").iterdir()] == ["ia3_all_1"]
    resumed = compare(plan(world, tmp_path / "c", methods, inference=False), quiet=True)
    for ours, theirs in zip(resumed.records, straight.records, strict=True):
        assert (ours.quality, ours.curve, ours.loss) == (theirs.quality, theirs.curve, theirs.loss)


def test_a_method_that_the_model_has_no_place_for_is_told_and_stops_nothing(world, tmp_path):
    flags = {"model": str(world / "llama"), "data": str(world / "prompted.jsonl"), "max_steps": 2}
    template = template_of([*WORDS, "generation_metrics=false"], flags)
    done = compare(Plan(template, variants_of("bitfit,lora,prefix"), (1,), tmp_path / "c"), quiet=True)
    rows = {row.label: row for row in done.rows}
    assert "BitFit trains biases" in rows["BitFit"].error
    assert rows["LoRA"].first.metric == "loss"
    assert set(rows["LoRA"].inference) == {"prefill", "decode"}
    assert set(rows["Prefix"].inference["decode"]) == {"unmerged"}
    assert "BitFit trains biases" in (tmp_path / "c" / "report.md").read_text()


def test_data_without_a_fixed_held_out_part_cannot_be_sampled(world, tmp_path):
    (tmp_path / "few.jsonl").write_text((world / "labelled.jsonl").read_text()[:300].rpartition("\n")[0] + "\n")
    flags = {"model": str(world / "bert"), "data": str(tmp_path / "few.jsonl"), "max_steps": 2}
    with pytest.raises(ConfigError, match="no held-out part"):
        compare(Plan(template_of([], flags), variants_of("lora"), (1,), tmp_path / "c", sizes=(3, None)), quiet=True)


def test_the_command_line(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["inlay", "compare", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    common = ("--data", str(world / "labelled.jsonl"), "--methods", "ia3", "--seeds", "1", "--steps", "2", *WORDS)
    code, out, err = run("--model", str(world / "bert"), *common, "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)[0]
    assert row["label"] == "IA3"
    assert set(row["inference"]) == {"batch 6", "one row"}
    assert (tmp_path / "runs/compare-bert-labelled.jsonl/report.html").exists()
    code, out, err = run(*common)
    assert code == 2
    assert "both --model and --data" in err
    code, out, err = run("--model", str(world / "bert"), *common, "learning_rat=1")
    assert code == 2
    assert "did you mean 'learning_rate'" in err


SHARING = "lora,prefix:length=3,headonly,full"


def test_side_by_side_is_as_alone(world, tmp_path, monkeypatch):
    shared: list[int] = []
    fit = together.fit
    monkeypatch.setattr(together, "fit", lambda model, members: (shared.append(len(members)), fit(model, members))[1])
    runs = {
        side: {
            r.label: r for r in compare(plan(world, tmp_path / str(side), SHARING, together=side), quiet=True).records
        }
        for side in (False, True)
    }
    assert shared == [3], "full fine-tuning changes the base, the others share it"
    for label, alone in runs[False].items():
        beside = runs[True][label]
        assert (beside.trained, beside.stored, beside.steps) == (alone.trained, alone.stored, alone.steps)
        assert beside.quality == pytest.approx(alone.quality, abs=1e-5)
        assert [loss for _, loss in beside.loss] == pytest.approx([loss for _, loss in alone.loss], abs=1e-5)
        assert beside.together == (label != "Full")
        assert beside.peak_bytes is not None
        assert beside.step_seconds


def test_side_by_side_goes_on_where_it_was_interrupted(world, tmp_path, monkeypatch):
    whole = compare(plan(world, tmp_path / "whole", "lora,bitfit", together=True, inference=False), quiet=True)
    fit = together.fit

    def once(model, members):
        monkeypatch.setattr(together, "fit", fit)
        members[0].loop.stop.signum = signal.SIGTERM
        fit(model, members)

    monkeypatch.setattr(together, "fit", once)
    wanted = plan(world, tmp_path / "c", "lora,bitfit", together=True, inference=False)
    with pytest.raises(Interrupted):
        compare(wanted, quiet=True)
    again = compare(wanted, quiet=True)
    assert {r.label: r.quality for r in again.records} == {r.label: r.quality for r in whole.records}


def test_what_cannot_be_used_stops_nobody_beside_it(world, tmp_path):
    found = compare(
        plan(world, tmp_path / "c", "lora,bitfit,inlay:sites=nowhere", together=True, inference=False), quiet=True
    )
    errors = {r.label: bool(r.error) for r in found.records}
    assert list(errors.values()).count(True) == 1
    assert not errors["LoRA"]
