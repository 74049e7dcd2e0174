"""What is shown while a run goes on, where its numbers go, and what it draws."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from inlay.errors import ConfigError
from inlay.train import report, trackers
from inlay.train.progress import Display, clock

RECORD = {
    "step": 3,
    "epoch": 0.5,
    "loss": 0.25,
    "learning_rate": 1e-3,
    "tokens_per_second": 1234.5,
    "eta": 75.0,
}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def shown(display: Display) -> str:
    file = display.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_off_a_terminal_there_are_plain_lines_at_logged_steps_only():
    display = Display(console(False), 10)
    with display:
        display.step(RECORD, logged=False)
        display.step(RECORD, logged=True)
        display.evaluation(3, {"loss": 0.5, "accuracy": 0.75}, best=True)
    assert shown(display).splitlines() == [
        "step 3/10  epoch 0.50  loss 0.2500  lr 1.00e-03  1,234 tok/s  ETA 1:15",
        "held-out at step 3  loss 0.5  accuracy 0.75  best so far",
    ]


def test_on_a_terminal_one_line_lives():
    display = Display(console(True), 10)
    with display:
        for step in range(1, 10):
            display.step(RECORD | {"step": step}, logged=False)
        display._bar.refresh()
    assert "step 9/10" in shown(display)
    assert "\n" not in shown(display).rstrip("\n").replace("\x1b[2K", "") or "\x1b" in shown(display)


def test_quiet_is_silent():
    display = Display(console(False), 10, quiet=True)
    with display:
        display.step(RECORD, logged=True)
        display.note("something")
        display.evaluation(3, {"loss": 1.0}, best=False)
    assert shown(display) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.9, "0:59"), (61, "1:01"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_line_that_cannot_be_written_is_written_later(tmp_path):
    log = trackers.JsonLines(tmp_path / "away" / "metrics.jsonl")
    log.log({"step": 1})
    with pytest.raises(OSError, match="No such file"):
        log.close()
    (tmp_path / "away").mkdir()
    log.log({"step": 2})
    log.close()
    lines = (tmp_path / "away" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


class FakeRun:
    """Stands for the module wandb or trackio."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **settings: Any) -> None:
        self.calls.append(("init", settings["name"], settings["config"]["seed"]))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_numbers_under_their_split(monkeypatch, tmp_path, name):
    fake = FakeRun()
    monkeypatch.setitem(__import__("sys").modules, name, fake)
    opened = trackers.open_trackers([name], tmp_path, {"seed": 1})
    for tracker in opened:
        tracker.log({"split": "train", "step": 2, "loss": 0.5, "note": "text"})
        tracker.close()
    assert fake.calls == [("init", tmp_path.name, 1), (2, {"train/loss": 0.5}), "finish"]
    assert (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for tracker in trackers.open_trackers(["tensorboard"], tmp_path, {"seed": 1}):
        tracker.log({"split": "eval", "step": 3, "accuracy": 0.25, "note": "text"})
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/accuracy")] == [(3, 0.25)]


def test_mlflow_gets_the_numbers_and_the_settings(monkeypatch, tmp_path):
    calls: list[Any] = []

    class Fake:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **keys: calls.append((name, *arguments, *keys.values()))

    monkeypatch.setitem(__import__("sys").modules, "mlflow", Fake())
    for tracker in trackers.open_trackers(["mlflow"], tmp_path, {"seed": 1}):
        tracker.log({"split": "train", "step": 2, "loss": 0.5})
        tracker.close()
    assert calls == [
        ("set_experiment", "inlay"), ("start_run", tmp_path.name), ("log_params", {"seed": "1"}),
        ("log_metrics", {"train/loss": 0.5}, 2), ("end_run",),
    ]  # fmt: skip


def test_nothing_but_the_file_by_default(tmp_path):
    opened = trackers.open_trackers([], tmp_path, {})
    assert [type(tracker).__name__ for tracker in opened] == ["JsonLines"]


def test_an_absent_tracker_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": "surely_not_installed"})
    with pytest.raises(ConfigError, match=r"report_to: wandb is not installed; pip install 'inlay\[wandb\]'"):
        trackers.check(["wandb"])


def write_log(run: Path, metric: str) -> None:
    records = [{"split": "train", "step": s, "loss": 2.0 / s} for s in range(1, 9)]
    records += [{"split": "eval", "step": s, "loss": 1.0 / s, metric: s / 8} for s in (4, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_the_plot_has_a_second_panel_for_a_metric_that_is_not_the_loss(tmp_path):
    from PIL import Image

    widths = {}
    for metric in ("loss", "accuracy"):
        run = tmp_path / metric
        run.mkdir()
        write_log(run, "accuracy")
        path = report.plot(run, metric)
        assert path is not None
        with Image.open(path) as picture:
            widths[metric] = picture.width
            assert len(picture.convert("RGB").getcolors(1_000_000)) > 100
    assert widths["accuracy"] > widths["loss"] * 1.5


def test_no_log_no_plot(tmp_path):
    assert report.plot(tmp_path, "loss") is None


def test_a_table_of_results():
    table = report.table({"untouched": {"loss": 2.0}, "LoRA": {"loss": 1.0, "accuracy": 0.51234}})
    assert table.splitlines()[2:] == ["| untouched |  | 2 |", "| LoRA | 0.5123 | 1 |"]


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1_500, "1.5 kB"), (2_500_000_000, "2.5 GB")])
def test_sizes(count, text):
    assert report.size(count) == text
