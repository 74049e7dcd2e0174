"""Several processes make the steps that one makes: equal weights, equal log, one checkpoint; none is left alone."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from children import output, team
from inlay.config_loading import load
from inlay.errors import AttachmentError, CheckpointError, ConfigError
from inlay.train import checkpoint
from inlay.train.distributed import Team, is_sharded, same_step, shard
from inlay.train.loop import Loop
from inlay.train.run import train
from inlay.train.session import open_accelerator
from tiny import batch, tiny
from train.engine import Rows, config, loop
from train.worlds import data_file, model_folder

SETTINGS: dict[str, Any] = {
    "dropout": 0.2, "save_steps": 2, "eval_steps": 3, "num_train_epochs": 2.0, "optim": "sgd", "save_total_limit": 9,
}  # fmt: skip


def numbers(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "split")} for line in lines]


def assert_same_numbers(one: Path, other: Path) -> None:
    ours, theirs = numbers(one), numbers(other)
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(its, rel=1e-5, abs=1e-5)


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-5, name


def assert_same_folders(one: Path, other: Path) -> None:
    """Names of all files, and all tensors within 1e-5."""
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith("adapter.safetensors"):
            assert_same_tensors(one / name, other / name)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_equal_one_that_accumulates(tmp_path, size):
    """7 batches an epoch: at its end some have none of their own. Dropout's masks follow the batch, not the process."""
    many, one = tmp_path / "many", tmp_path / "one"
    codes = team(size, lambda rank: (loop(many, rows=Rows(20, 3), **SETTINGS).fit(), None)[1], tmp_path / "logs")
    assert codes == [0] * size, output(tmp_path / "logs")
    loop(one, rows=Rows(20, 3), gradient_accumulation_steps=size, **SETTINGS).fit()
    assert_same_numbers(many, one)
    assert sorted(p.name for p in many.iterdir()) == sorted(p.name for p in one.iterdir())
    for path in one.glob("checkpoint-*"):
        assert_same_folders(many / path.name, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model_folder(folder / "llama", "llama")
    data_file(folder / "prompted.jsonl", "prompted", count=41)
    os.environ["INLAY_CACHE"] = str(folder / "cache")
    return folder


def keys(world: Path, run: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "model": str(world / "llama"), "data": str(world / "prompted.jsonl"), "output_dir": str(run), "bf16": False,
        "max_steps": 6, "eval_steps": 3, "save_steps": 2, "per_device_train_batch_size": 4, "save_total_limit": 9,
        "generation_max_new_tokens": 3, "eval_samples": 1, "generation_eval_rows": 2, "use_cpu": True,
        "method": {"name": "lora", "rank": 2, "dropout": 0.1},
    }  # fmt: skip
    return settings | more


def run(world: Path, folder: Path, **more: Any) -> Any:
    return train(load(None, [], keys(world, folder, **more)), quiet=True)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_sharded_base_trains_the_same_adapter(world, tmp_path, quantization):
    sharded, one = tmp_path / "sharded", tmp_path / "one"

    def act(rank: int) -> None:
        step = Loop._step

        def watched(self: Loop, group: Any) -> Any:
            assert is_sharded(self.model)
            frozen = [p for p in self.model.model.layers.parameters() if not p.requires_grad]
            held = sum(p.to_local().numel() for p in frozen)
            assert held == pytest.approx(sum(p.numel() for p in frozen) / 2)
            assert not any(hasattr(p, "full_tensor") for p in self.parameters)
            return step(self, group)

        Loop._step = watched  # type: ignore[method-assign]
        run(world, sharded, fsdp=True, quantization=quantization)

    codes = team(2, act, tmp_path / "logs")
    assert codes == [0, 0], output(tmp_path / "logs") + output(tmp_path / "logs", 1)
    run(world, one, gradient_accumulation_steps=2, quantization=quantization)
    assert_same_numbers(sharded, one)
    for name in ("adapter", "best", "checkpoint-6"):
        assert_same_folders(sharded / name, one / name)
    results = [json.loads((folder / "results.json").read_text()) for folder in (sharded, one)]
    assert results[0]["LoRA"] == pytest.approx(results[1]["LoRA"], abs=1e-4)
    assert (sharded / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


def test_two_interrupted_processes_are_gone_on_with_by_one(world, tmp_path):
    """A signal to one of them ends both at the same step, and one process makes steps of the same batches."""
    resumed, one = tmp_path / "resumed", tmp_path / "one"

    def act(rank: int) -> None:
        step = Loop._step

        def signalled(self: Loop, group: Any) -> Any:
            if rank == 1 and self.state.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, group)

        Loop._step = signalled  # type: ignore[method-assign]
        run(world, resumed)

    codes = team(2, act, tmp_path / "logs")
    assert codes == [143, 143], output(tmp_path / "logs")
    found, skipped = checkpoint.newest(resumed)
    assert (found, skipped) == (resumed / "checkpoint-3", [])
    result = train(load(resumed / "config.yaml", [], {"resume": str(resumed)}), quiet=True)
    assert result.state.step == 6
    run(world, one, gradient_accumulation_steps=2)
    assert_same_tensors(resumed / "adapter" / "adapter.safetensors", one / "adapter" / "adapter.safetensors")
    assert_same_numbers(resumed, one)


def test_when_one_is_killed_the_others_stop_and_say_how_to_go_on(tmp_path):
    folder = tmp_path / "run"

    def act(rank: int) -> None:
        class Deadly(Rows):
            def epoch(self, n: int, start: int = 0, step: int = 1) -> Any:
                for number, each in enumerate(super().epoch(n, start, step)):
                    if (rank, n, number) == (1, 1, 1):
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield each

        loop(folder, rows=Deadly(20, 3), **SETTINGS).fit()

    began = time.monotonic()
    codes = team(2, act, tmp_path / "logs")
    assert codes == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    said = output(tmp_path / "logs")
    assert "TrainingError: process 0 of 2: another process of this run has ended or no longer answers" in said
    assert f"inlay train --resume {folder}" in said
    found, skipped = checkpoint.newest(folder)
    assert found is not None
    assert (found.name, skipped) == ("checkpoint-4", [])


def test_attaching_to_a_sharded_model_is_refused_and_a_sharded_adapter_is_saved_whole(tmp_path):
    def act(rank: int) -> None:
        from torch.distributed.fsdp import fully_shard

        Team(open_accelerator(config(use_cpu=True)))  # starts the process group
        model = tiny("llama")
        fully_shard(model)
        with pytest.raises(AttachmentError, match=r"sharded already.*Attach first, then call fully_shard"):
            inlay.attach(model, inlay.LoRA(rank=2))
        model = tiny("llama")
        torch.manual_seed(0)
        adapter = inlay.attach(model, inlay.LoRA(rank=2))
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        rows = {k: v[rank * 2 : rank * 2 + 2] for k, v in batch(model, rows=4, padding="none").items()}
        model(**rows).loss.backward()
        optimizer.step()
        adapter.save(tmp_path / "sharded")
        kept = {name: tensor.full_tensor().clone() for name, tensor in adapter.state_dict().items()}
        adapter.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in kept.items()})
        adapter.load_state_dict(kept)
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(tensor.full_tensor(), kept[name])

    codes = team(2, act, tmp_path / "logs")
    assert codes == [0, 0], output(tmp_path / "logs") + output(tmp_path / "logs", 1)
    model = tiny("llama")
    torch.manual_seed(0)
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**batch(model, rows=4, padding="none")).loss.backward()
    optimizer.step()
    adapter.save(tmp_path / "one")
    assert_same_folders(tmp_path / "sharded", tmp_path / "one")


def test_alone_there_is_nobody_to_share_with():
    alone = Team(open_accelerator(config(use_cpu=True)))
    with pytest.raises(ConfigError, match="there is one process"):
        shard(tiny("llama"), None, alone)
    assert alone.gathered(3) == [3]
    assert alone.of_main("x") == "x"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_the_same_adapter(world, tmp_path, stage):
    """As `accelerate launch --use_deepspeed` says it; below stage 3 nothing of DeepSpeed's is needed."""
    if stage == 3 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    file = tmp_path / "zero.json"
    section = {"stage": stage, "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps({"zero_optimization": section, "gradient_clipping": "auto"}))

    def act(rank: int) -> None:
        warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls torch by names that are going
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
        step = Loop._step

        def watched(self: Loop, group: Any) -> Any:
            assert is_sharded(self.model) == (stage == 3)
            frozen = [p for p in self.model.model.layers[1].parameters() if not p.requires_grad]
            held = sum(p.numel() + p.ds_tensor.numel() if stage == 3 else p.numel() for p in frozen)
            assert held == pytest.approx(7744 / (2 if stage == 3 else 1), rel=0.01)
            return step(self, group)

        Loop._step = watched  # type: ignore[method-assign]
        run(world, tmp_path / "many")

    codes = team(2, act, tmp_path / "logs")
    assert codes == [0, 0], output(tmp_path / "logs") + output(tmp_path / "logs", 1)
    run(world, tmp_path / "one", gradient_accumulation_steps=2)
    assert_same_numbers(tmp_path / "many", tmp_path / "one")
    for name in ("adapter", "best", "checkpoint-6"):
        assert_same_folders(tmp_path / "many" / name, tmp_path / "one" / name)
    results = [json.loads((tmp_path / name / "results.json").read_text())["LoRA"] for name in ("many", "one")]
    assert results[0] == pytest.approx(results[1], abs=1e-4)


def test_a_step_that_cannot_be_shared_evenly():
    processes = Team(open_accelerator(config(use_cpu=True)))
    processes.size = 4
    assert same_step(config(gradient_accumulation_steps=3), 8, processes).gradient_accumulation_steps == 2
    with pytest.raises(CheckpointError, match=r"a step of this run is 6 batches, .* resume on 1, 2, 3, 6"):
        same_step(config(), 6, processes)
