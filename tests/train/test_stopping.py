"""A signal in any phase of a run ends it with 128 + signal and loses nothing; a second one ends it at once."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import inlay.data.encode_text
from children import fork, wait
from inlay import folders
from inlay.config_loading import load
from inlay.errors import TrainingError
from inlay.train import baseline, checkpoint, models, precision, report, run, runfolder
from inlay.train.evaluate import Evaluator
from inlay.train.loop import Loop
from train.worlds import data_file, model_folder

SETTINGS: dict[str, Any] = {
    "max_steps": 4, "eval_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "eval_samples": 1,
    "generation_max_new_tokens": 4, "generation_eval_rows": 2, "method": {"name": "lora", "rank": 2, "dropout": 0.1},
}  # fmt: skip
"""Both families of tasks: generation writes samples, classification trains the head alone at the end."""

# phase: family, data, where, and at which call
PHASES: dict[str, tuple[str, str, Any, str, int]] = {
    "tokenizing": ("llama", "prompted", inlay.data.encode_text.CausalEncoder, "__call__", 1),
    "loading": ("llama", "prompted", models, "load_model", 1),
    "measuring bf16": ("llama", "prompted", precision, "faster_in_bf16", 1),
    "before the first step": ("llama", "prompted", Evaluator, "_forward", 1),
    "a step": ("llama", "prompted", Loop, "_backward", 2),
    "an evaluation": ("llama", "prompted", Evaluator, "_forward", 2),
    "writing samples": ("llama", "prompted", run.Samples, "write", 2),
    "a checkpoint": ("llama", "prompted", folders, "_sync_all", 4),
    "the last checkpoint": ("bert", "labelled", checkpoint, "prune", 4),
    "the baseline": ("bert", "labelled", baseline, "Loop", 1),
    "the report": ("bert", "labelled", report, "card", 1),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    model_folder(folder / "bert", "bert")
    model_folder(folder / "llama", "llama")
    for kind in ("labelled", "prompted"):
        data_file(folder / f"{kind}.jsonl", kind)
    return folder


def go(
    world: Path, folder: Path, family: str, kind: str, at: tuple[Any, str, int] | None = None, send: Any = None
) -> None:
    """What a user does who wants the run done: start it, or go on with it. Signals come at the n-th call of `at`."""
    os.environ["INLAY_CACHE"] = str(folder.with_name(f"{folder.name}-cache"))
    report.plot = lambda *_: None  # type: ignore[assignment]
    runfolder.environment = lambda: dict.fromkeys(("inlay", "torch", "python"), "")
    precision.faster_in_bf16 = lambda device: False  # type: ignore[assignment]
    if at is not None:
        signalling(*at, send)
    if (folder / "config.yaml").exists():
        config = load(folder / "config.yaml", [], {"resume": str(folder)})
    else:
        settings = SETTINGS | {"model": str(world / family), "data": str(world / f"{kind}.jsonl")}
        config = load(None, [], settings | {"output_dir": str(folder)})
    run.train(config, quiet=True)


def signalling(where: Any, name: str, at: int, send: Callable[[], None]) -> None:
    """Let the n-th call of a function send signals before it does its work."""
    real, calls = getattr(where, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            send()
        return real(*args, **kwargs)

    setattr(where, name, call)


def once() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def twice() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            lines = map(json.loads, (folder / name).read_text().splitlines())
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return found | {"results": json.loads((folder / "results.json").read_text())}


@pytest.fixture(scope="module")
def straight(world: Path) -> dict[str, dict[str, Any]]:
    """What a run in one go leaves, by family."""
    found = {}
    for family, kind in (("llama", "prompted"), ("bert", "labelled")):
        folder = world / f"straight-{family}"
        assert wait(fork(lambda f=folder, m=family, k=kind: go(world, f, m, k), world / "log")) == 0
        found[family] = contents(folder)
    return found


def ended_and_gone_on_with(world: Path, folder: Path, phase: str, send: Callable[[], None], code: int) -> None:
    """Signals in a phase end the run with a code; what is there is whole, and the run goes on to its end."""
    family, kind, *at = PHASES[phase]
    log = folder.with_name("output.log")
    assert wait(fork(lambda: go(world, folder, family, kind, tuple(at), send), log)) == code, log.read_text()
    assert checkpoint.newest(folder)[1] == []
    assert wait(fork(lambda: go(world, folder, family, kind), log)) == 0, log.read_text()


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_loses_nothing(world, straight, tmp_path, phase):
    ended_and_gone_on_with(world, tmp_path / "run", phase, once, 143)
    assert contents(tmp_path / "run") == straight[PHASES[phase][0]]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("phase", ["tokenizing", "a step", "a checkpoint", "the report"])
def test_a_second_signal_ends_any_phase_at_once(world, straight, tmp_path, phase):
    ended_and_gone_on_with(world, tmp_path / "run", phase, twice, 130)
    assert contents(tmp_path / "run") == straight[PHASES[phase][0]]


@pytest.mark.parametrize("most", [300, 9_000])
def test_a_disk_that_takes_no_more_ends_the_run_with_a_message(world, straight, tmp_path, most):
    """Files may not grow beyond so many bytes: already the configuration, or only what the optimizer keeps."""
    folder, log = tmp_path / "run", tmp_path / "output.log"

    def act() -> None:
        real = runfolder.write_start

        def limited(*args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            real(*args)

        runfolder.write_start = limited
        go(world, folder, "llama", "prompted")

    assert wait(fork(act, Path(os.devnull))) == TrainingError.exit_code
    assert wait(fork(lambda: go(world, folder, "llama", "prompted"), log)) == 0, log.read_text()
    assert contents(folder) == straight["llama"]
