"""Runs side by side are the runs made alone: weights, logs, checkpoints; and what is interrupted goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.config_loading import load
from inlay.errors import ConfigError
from inlay.sweep import together
from inlay.sweep.run import sweep
from inlay.sweep.space import Space
from inlay.train.checkpoint import Interrupted
from inlay.train.loop import Loop
from inlay.train.metrics import HIGHER_IS_BETTER
from inlay.train.run import train
from tiny import tiny
from train.worlds import data_file, model_folder, tokenizer

FAST = ["max_steps=4", "eval_steps=2", "save_steps=2", "bf16=false", "baseline=false", "generation_metrics=false"]
FAST += ["eval_samples=0", "per_device_train_batch_size=4", "gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny("bert", dropout=0.2).save_pretrained(folder / "bert")  # the base draws random numbers
    tokenizer("bert").save_pretrained(folder / "bert")
    model_folder(folder / "llama", "llama")
    data_file(folder / "labelled.jsonl", "labelled", count=30)
    data_file(folder / "prompted.jsonl", "prompted", count=30)
    return folder


@pytest.fixture(autouse=True)
def cache(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(world / "cache"))
    monkeypatch.chdir(tmp_path)


def words(world: Path, family: str, kind: str) -> list[str]:
    return [f"model={world / family}", f"data={world / kind}.jsonl", *FAST]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs shared each training pass."""
    sizes: list[int] = []
    real = together._repeated

    def repeated(batch: Any, times: int) -> Any:
        sizes.append(times)
        return real(batch, times)

    monkeypatch.setattr(together, "_repeated", repeated)
    return sizes


def assert_same_run(one: Path, other: Path) -> None:
    """Log and tensors of two runs within 1e-5, and the same files."""
    logs = []
    for folder in (one, other):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        logs.append([{k: v for k, v in line.items() if k not in ("seconds", "split")} for line in lines])
    assert len(logs[0]) == len(logs[1])
    for mine, its in zip(*logs, strict=True):
        assert mine == pytest.approx(its, abs=1e-5)
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (one, other)]
    assert files[0] == files[1]
    for name in ("adapter/adapter.safetensors", "checkpoint-4/adapter.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] - tensor).abs().max() < 1e-5, key


@pytest.mark.parametrize(
    ("family", "kind", "varied", "full"),
    [
        ("bert", "labelled", ["learning_rate=1e-3,5e-3", "method.rank=2,4"], 1 << 20),
        ("bert", "labelled", ["learning_rate=1e-3,5e-3", "method.rank=2,4"], 1),
        ("llama", "prompted", ["method=lora,bottleneck,prefix,ia3"], 1 << 20),
    ],
)
def test_side_by_side_is_as_alone(world, tmp_path, monkeypatch, family, kind, varied, full):
    sizes = counted(monkeypatch)
    monkeypatch.setattr(together, "FULL", full)
    space = Space.of([*words(world, family, kind), *varied])
    swept = sweep(None, space, space.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)
    assert set(sizes) == {4 if full > 1 else 1}
    for point in space.grid()[1:3]:  # different in both settings, or methods of two kinds
        alone = train(load(None, [*space.fixed, *point.words], {"output_dir": str(tmp_path / point.name)}), quiet=True)
        assert_same_run(tmp_path / "sweep" / point.name, alone.run)
        row = next(row for row in swept.rows if row["run"] == point.name)
        assert row["loss"] == pytest.approx(list(alone.results.values())[-1]["loss"], abs=1e-5)
    assert {"README.md", "sweep.png", "sweep.json", "results.json"} <= {p.name for p in (tmp_path / "sweep").iterdir()}
    values = [row[swept.metric] for row in swept.rows]
    assert values == sorted(values, reverse=swept.metric in HIGHER_IS_BETTER)
    base = tiny("llama") if family == "llama" else tiny("bert", "cls", dropout=0.2)
    loaded = inlay.load(base, tmp_path / "sweep" / swept.rows[0]["run"] / "adapter", allow_other_base=True)
    assert loaded.trained_parameters == swept.rows[0]["trained_parameters"]


def test_passes_hold_what_fills_a_cpu_and_everything_elsewhere():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for runs in range(1, 10):
        for tokens in (0, 1, 100, 200, 512, 5000):
            shares = together.passes(runs, tokens, cpu)
            assert [number for share in shares for number in share] == list(range(runs))
            assert all(len(share) == 1 or len(share) * tokens <= together.FULL for share in shares)
            assert together.passes(runs, tokens, cuda) == [range(runs)]


def test_prefixes_of_a_sweep_start_from_words_as_alone(world, tmp_path, monkeypatch):
    sizes = counted(monkeypatch)
    method = ["method={name: prefix, length: 3}", "init_text=the red cat"]
    space = Space.of([*words(world, "llama", "prompted"), *method, "learning_rate=1e-3,5e-3"])
    sweep(None, space, space.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)
    assert set(sizes) == {2}
    point = space.grid()[1]
    alone = train(load(None, [*space.fixed, *point.words], {"output_dir": str(tmp_path / "alone")}), quiet=True)
    assert_same_run(tmp_path / "sweep" / point.name, alone.run)
    plain = [word for word in space.fixed if not word.startswith("init_text")]
    other = train(load(None, [*plain, *point.words], {"output_dir": str(tmp_path / "other")}), quiet=True)
    assert other.state.last["loss"] != pytest.approx(alone.state.last["loss"], abs=1e-4)


def test_what_cannot_share_runs_alone(world, tmp_path, monkeypatch):
    """A method with dropout of its own, and one that needs other batches, beside two that share."""
    sizes = counted(monkeypatch)
    space = Space.of(
        [*words(world, "llama", "prompted"), "method={name: lora, dropout: 0.1},ia3,{name: lora, rank: 2}"]
    )
    space = Space((("method", ("{name: lora, dropout: 0.1}", "ia3", "{name: lora, rank: 2}")),), space.fixed)
    swept = sweep(None, space, space.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)
    assert set(sizes) == {2}
    assert len(swept.rows) == 3
    sizes.clear()
    again = sweep(None, space, space.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)
    assert sizes == []
    assert again.rows == swept.rows
    other = Space(space.axes, (*space.fixed, "seed=7"))
    with pytest.raises(ConfigError, match="seed: 42 then, 7 now"):
        sweep(None, other, other.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)


def test_an_interrupted_sweep_goes_on_to_the_same_bits(world, tmp_path, monkeypatch):
    space = Space.of([*words(world, "bert", "labelled"), "learning_rate=1e-3,5e-3"])
    sweep(None, space, space.grid(), output_dir=str(tmp_path / "straight"), quiet=True)
    with monkeypatch.context() as patch:
        real = Loop._apply

        def apply(self: Loop, *arguments: Any) -> Any:
            if self.state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                patch.setattr(Loop, "_apply", real)
            return real(self, *arguments)

        patch.setattr(Loop, "_apply", apply)
        with pytest.raises(Interrupted) as stopped:
            sweep(None, space, space.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)
    assert stopped.value.exit_code == 143
    sweep(None, space, space.grid(), output_dir=str(tmp_path / "sweep"), quiet=True)
    for point in space.grid():
        ours, theirs = (tmp_path / f / point.name / "adapter" / "adapter.safetensors" for f in ("sweep", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_dropout_draws_for_each_run_what_it_draws_alone():
    x = torch.randn(6, 5)
    query = torch.randn(6, 2, 4, 8)
    expected = []
    for _ in range(3):
        torch.manual_seed(3)
        first = torch.nn.functional.dropout(x[:2], 0.5)
        attended = torch.nn.functional.scaled_dot_product_attention(query[:2], query[:2], query[:2], dropout_p=0.5)
        expected.append((first, attended, torch.rand(1)))
    torch.manual_seed(3)
    same = torch.cat([x[:2]] * 3), torch.cat([query[:2]] * 3)
    with together.AlikeForEach(3, 2):
        dropped = torch.nn.functional.dropout(same[0], 0.5)
        attended = torch.nn.functional.scaled_dot_product_attention(same[1], same[1], same[1], dropout_p=0.5)
    after = torch.rand(1)
    for number, (first, second, third) in enumerate(expected):
        assert torch.equal(dropped[number * 2 : number * 2 + 2], first)
        torch.testing.assert_close(attended[number * 2 : number * 2 + 2], second)
        assert torch.equal(after, third)
