"""The start of a run, killed anywhere, is a run that can be gone on with or a folder that can be used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from children import killed_at
from inlay import folders
from inlay.errors import ConfigError
from inlay.train import runfolder
from train.engine import config


def prepared() -> Any:
    report = SimpleNamespace(max_length=8, lines=lambda: ["a line"])
    facts = {"task": "causal-lm", "format": "f", "columns": {}, "labels": None, "multi_label": False}
    return SimpleNamespace(**facts, multi_text=False, report=report, fingerprint="x", train=[1], evals={})


def test_killed_at_any_file_operation_a_start_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runfolder, "environment", dict)
    run, event, found = tmp_path / "run", 0, set()
    died = True
    while died:
        event += 1
        died = killed_at(event, run, lambda: runfolder.write_start(run, config(), prepared()))
        if (run / runfolder.MARK).exists():
            found.add("a run")
            assert runfolder.read_config(run).model == "m"
            assert runfolder.place(config(resume=str(run)), "lora") == (run, None)
        else:
            found.add("nothing")
            assert runfolder.place(config(output_dir=str(run)), "lora") == (run, None)
        runfolder.write_start(run, config(), prepared())
        assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "data.json", "env.json"]
        for path in run.iterdir():
            path.unlink()
        run.rmdir()
    assert found == {"a run", "nothing"}
    assert event > 6


def test_another_folders_files_are_in_the_way(tmp_path):
    (tmp_path / "run" / ".writing-config.yaml").parent.mkdir()
    (tmp_path / "run" / ".writing-config.yaml").write_text("half")
    assert not folders.holds_something(tmp_path / "run")
    (tmp_path / "run" / ".notes").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        runfolder.place(config(output_dir=str(tmp_path / "run")), "lora")


def test_samples_cut_by_a_kill_are_dropped_with_those_of_later_steps(tmp_path):
    lines = [json.dumps({"step": step, "generated": "é\u2028"}, ensure_ascii=False) + "\n" for step in (0, 2, 4)]
    (tmp_path / "samples.jsonl").write_text("".join(lines) + '{"step": 4, "gener')
    runfolder.forget_after(tmp_path, 2)
    assert (tmp_path / "samples.jsonl").read_text() == "".join(lines[:2])


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    import resource

    from children import fork, wait

    path = tmp_path / "log"
    path.write_text("one\n")

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="too large"):
            folders.append_text(path, "x" * 50 + "\n")
        assert path.read_text() == "one\n"
        folders.append_text(path, "two\n")

    assert wait(fork(act, tmp_path / "output.log")) == 0, Path(tmp_path / "output.log").read_text()
    assert path.read_text() == "one\ntwo\n"
