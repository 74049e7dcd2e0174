"""A run from its configuration to its folder, for every task, and the way back into it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.config_loading import load
from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.train import checkpoint
from inlay.train.loop import Loop
from inlay.train.run import Result, train
from inlay.train.runfolder import read_config
from inlay.train.trained import open_trained
from train.worlds import COLOURS, data_file, model_folder

Words = dict[str, Any]
FAST: Words = {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 8, "baseline": False, "bf16": False}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    model_folder(folder / "bert", "bert")
    model_folder(folder / "llama", "llama")
    model_folder(folder / "t5", "t5")
    for kind in ("labelled", "numbers", "tagged", "prompted", "spans", "document"):
        data_file(folder / f"{kind}.jsonl", kind)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(world: Path, family: str, kind: str, output: Path, **keys: Any) -> Result:
    settings = FAST | {"model": str(world / family), "data": str(world / f"{kind}.jsonl"), "output_dir": str(output)}
    return train(load(None, [], settings | keys), quiet=True)


CASES = [
    ("bert", "labelled", {}, "sequence-classification", "accuracy"),
    ("bert", "numbers", {"task": "regression"}, "regression", "spearman"),
    ("bert", "tagged", {}, "token-classification", "f1"),
    ("bert", "spans", {}, "question-answering", "exact_match"),
    ("llama", "prompted", {}, "causal-lm", "perplexity"),
    ("llama", "document", {}, "causal-lm", "token_accuracy"),
    ("llama", "labelled", {}, "sequence-classification", "mcc"),
    ("t5", "prompted", {}, "seq2seq", "bleu"),
]


@pytest.mark.parametrize(
    ("family", "kind", "keys", "task", "metric"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_task_leaves_a_whole_run_folder(world, tmp_path, family, kind, keys, task, metric):
    result = run(world, family, kind, tmp_path / "run", generation_max_new_tokens=4, **keys)
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert present >= {
        "config.yaml", "data.json", "env.json", "metrics.jsonl", "loss.png", "adapter", "best", "README.md",
        "results.json", "checkpoint-2", "checkpoint-4",
    }  # fmt: skip
    assert ("samples.jsonl" in present) == (task in ("causal-lm", "seq2seq"))
    assert json.loads((tmp_path / "run" / "data.json").read_text())["task"] == task
    assert metric in result.results["LoRA"]
    assert result.results["untouched"]["loss"] != result.results["LoRA"]["loss"]
    trained = open_trained(tmp_path / "run")
    again = next(iter(trained.evaluate().values()))
    for name, value in again.items():
        assert value == pytest.approx(result.results["LoRA"][name], abs=1e-5), name
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2106.09685" in card
    assert f"inlay {'generate' if kind in ('prompted', 'document') else 'predict'} " in card


def test_the_task_is_learnt_and_new_rows_are_predicted(world, tmp_path):
    """The label is one of the words, so a few steps of full fine-tuning must find it."""
    result = run(
        world, "bert", "labelled", tmp_path / "run", method="full", learning_rate=5e-3, max_steps=60, eval_steps=20
    )
    assert result.results["untouched"]["accuracy"] < 0.9
    assert result.results["Full"]["accuracy"] == 1.0
    trained = open_trained(tmp_path / "run")
    said = list(trained.predict([f"a {colour} fish is in the house" for colour in COLOURS], top=3))
    assert [row["label"] for row in said] == COLOURS
    assert all(sum(row["top"].values()) == pytest.approx(1.0, abs=1e-3) for row in said)
    with pytest.raises(ConfigError, match="use: inlay predict"):
        trained.generate(["a"], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["prompt", "prefix", "mam"])
def test_untouched_is_the_base_and_not_a_fresh_adapter(world, tmp_path, method):
    result = run(world, "llama", "prompted", tmp_path / "run", method=method, generation_metrics=False)
    trained = open_trained(tmp_path / "run")
    (base,) = trained.evaluate_base().values()
    assert result.results["untouched"]["loss"] == pytest.approx(base["loss"], abs=1e-6)
    assert list(result.results) == ["untouched", {"prompt": "Prompt", "prefix": "Prefix", "mam": "MAM"}[method]]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["loss"]) == (0, result.results["untouched"]["loss"])


def test_a_new_head_has_a_rate_of_its_own_that_the_run_writes_down(world, tmp_path):
    run(world, "llama", "labelled", tmp_path / "run", learning_rate=1e-3)
    rate = read_config(tmp_path / "run").head_learning_rate
    assert rate is not None
    assert rate > 2e-3
    run(world, "llama", "labelled", tmp_path / "said", learning_rate=1e-3, head_learning_rate=0.5)
    assert read_config(tmp_path / "said").head_learning_rate == 0.5
    run(world, "bert", "labelled", tmp_path / "known", learning_rate=1e-3)  # its checkpoint has a head
    assert read_config(tmp_path / "known").head_learning_rate is None


def test_head_only_is_trained_beside_it_and_leaves_no_trace(world, tmp_path):
    result = run(world, "bert", "labelled", tmp_path / "run", baseline=True)
    assert list(result.results) == ["untouched", "head only", "LoRA"]
    assert result.results["head only"] != result.results["untouched"]
    plain = run(world, "bert", "labelled", tmp_path / "plain", baseline=False)
    ours, theirs = (r.run / "adapter" / "adapter.safetensors" for r in (result, plain))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_adapter_of_the_run_is_the_best_one_or_the_last(world, tmp_path):
    """The direction is turned round, so that the best adapter is the first one measured and not the last."""
    keys: Words = {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 0.01}
    for name, best in (("best", True), ("last", False)):
        result = run(world, "bert", "labelled", tmp_path / name, load_best_model_at_end=best, **keys)
        assert result.state.best_step == 2
        again = next(iter(open_trained(result.run).evaluate().values()))
        expected = result.state.best if best else result.state.last
        assert again["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert result.results["LoRA"]["loss"] == expected["loss"]
        assert result.state.best["loss"] > result.state.last["loss"] + 1e-4


def test_two_runs_of_one_seed_are_equal_to_the_byte_and_of_two_seeds_are_not(world, tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run(world, "bert", "labelled", tmp_path / name, seed=seed)
        files.append((result.run / "adapter" / "adapter.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_second_run_without_a_name_gets_a_folder_of_its_own(world, tmp_path):
    settings = FAST | {"model": str(world / "bert"), "data": str(world / "labelled.jsonl")}
    folders = [train(load(None, [], settings), quiet=True).run for _ in range(2)]
    assert [folder.as_posix() for folder in folders] == ["runs/bert-labelled-lora", "runs/bert-labelled-lora-2"]


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Send a real signal while a step is being made."""
    real = Loop._step

    def stepping(self: Loop, group: Any) -> tuple[float, float]:
        if self.state.step + 1 == step and self.run is not None:
            os.kill(os.getpid(), signum)
        return real(self, group)

    monkeypatch.setattr(Loop, "_step", stepping)


def test_samples_are_written_once_for_each_evaluation_also_after_a_resume(world, tmp_path, monkeypatch):
    keys = {"max_steps": 6, "eval_samples": 2, "generation_max_new_tokens": 3, "generation_metrics": False}
    keys["save_total_limit"] = 9
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGINT)
        with pytest.raises(checkpoint.Interrupted) as stopped:
            run(world, "llama", "prompted", tmp_path / "run", **keys)
    assert stopped.value.exit_code == 130
    train(load(tmp_path / "run" / "config.yaml", [], {"resume": str(tmp_path / "run" / "checkpoint-2")}), quiet=True)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert samples[0]["origin"].startswith("prompted.jsonl:")
    assert samples[0]["reference"] in COLOURS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
        ({"method": "bitfit"}, r"method: .*'rank': 8.* in the checkpoint, .*bitfit.* now"),
        ({"learning_rate": 0.1}, "learning_rate: 0.002 in the checkpoint, 0.1 now"),
        ({"max_steps": 9}, "steps: 4 in the checkpoint, 9 now"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 8 in the checkpoint, 4 now"),
    ],
)
def test_a_resume_with_something_else_is_refused(world, tmp_path, change, told):
    result = run(world, "bert", "labelled", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in result.run.rglob("*")}
    with pytest.raises(CheckpointError, match=told):
        train(load(result.run / "config.yaml", [], {"resume": str(result.run)} | change), quiet=True)
    assert {path: path.stat().st_mtime_ns for path in result.run.rglob("*")} == before


def test_other_data_and_another_base_are_refused(world, tmp_path):
    data = data_file(tmp_path / "mine.jsonl", "labelled")
    base = model_folder(tmp_path / "base", "bert")
    result = run(world, "bert", "labelled", tmp_path / "run", data=str(data), model=str(base))
    config = result.run / "config.yaml"
    data_file(data, "labelled", seed=1)
    with pytest.raises(CheckpointError, match=r"data: 'mine\.jsonl \w+' in the checkpoint, 'mine\.jsonl \w+' now"):
        train(load(config, [], {"resume": str(result.run)}), quiet=True)
    data_file(data, "labelled")
    from tiny import tiny

    tiny("bert", seed=1).save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"base: 'base \w+' in the checkpoint, 'base \w+' now"):
        train(load(config, [], {"resume": str(result.run)}), quiet=True)


def test_an_allowed_change_is_recorded(world, tmp_path):
    result = run(world, "bert", "labelled", tmp_path / "run")
    flags = {"resume": str(result.run), "allow_changed": True, "max_steps": 6}
    longer = train(load(result.run / "config.yaml", [], flags), quiet=True)
    assert longer.state.step == 6
    assert {"step": 4, "what": "steps", "was": 4, "now": 6} in longer.state.changes
    assert "step 4: `steps` was 4, became 6" in (result.run / "README.md").read_text()
    assert checkpoint.read_state(result.run / "checkpoint-6")["run"]["changes"] == longer.state.changes


def test_resume_takes_the_newest_whole_checkpoint_and_names_the_other(world, tmp_path, capsys):
    from rich.console import Console

    result = run(world, "bert", "labelled", tmp_path / "run")
    (result.run / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    config = load(result.run / "config.yaml", [], {"resume": str(result.run)})
    again = train(config, console=Console(width=300, force_terminal=False))
    printed = capsys.readouterr().out
    assert "checkpoint-4: optimizer.safetensors has 0 bytes" in printed
    assert "checkpoint-2, step 2 of 4" in printed
    assert again.state.step == 4


@pytest.mark.parametrize(
    ("prepare", "keys", "error", "told"),
    [
        ("run", {}, ConfigError, "holds a run; go on with it by --resume"),
        ("other", {}, ConfigError, "is not empty and holds no run"),
        ("file", {}, ConfigError, "is a file"),
        ("nothing", {"resume": "nowhere"}, CheckpointError, "nowhere is not a run folder"),
        ("nothing", {"resume": True, "output_dir": None}, ConfigError, "resume: name the run folder"),
    ],
)
def test_run_folders_that_cannot_be_used(world, tmp_path, prepare, keys, error, told):
    target = tmp_path / "run"
    if prepare == "file":
        target.write_text("x")
    elif prepare != "nothing":
        target.mkdir()
        (target / ("config.yaml" if prepare == "run" else "notes.txt")).write_text("x")
    with pytest.raises(error, match=told):
        run(world, "bert", "labelled", target, **keys)


def test_bad_data_leaves_nothing_behind(world, tmp_path):
    data = tmp_path / "broken.jsonl"
    data.write_text('{"text": "the cat", "label": "red"}\n{"text": 3, "label": "red"}\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2"):
        run(world, "bert", "labelled", tmp_path / "run", data=str(data))
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing_but_memory(world, tmp_path):
    """Equal to rounding: the recomputed forward pass is the same, dropout included."""
    weights = []
    for on in (False, True):
        result = run(world, "bert", "labelled", tmp_path / str(on), gradient_checkpointing=on)
        model = open_trained(result.run).adapter.state_dict()
        weights.append(torch.cat([tensor.flatten() for tensor in model.values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", ["nf4", "int4"])
def test_a_base_in_four_bits_is_packed_while_loading_and_its_new_head_is_not(world, tmp_path, monkeypatch, storage):
    import inlay.quant.model

    monkeypatch.setattr(inlay.quant.model, "quantize", lambda *_, **__: pytest.fail("the dense model was in memory"))
    result = run(world, "bert", "labelled", tmp_path / "run", quantization=storage, method={"name": "lora", "rank": 2})
    trained = open_trained(tmp_path / "run")
    leaf = trained.model.bert.encoder.layer[0].output.dense
    assert type(leaf).__name__.startswith("Linear4")
    assert leaf.quant_type == storage
    assert trained.model.classifier.weight.is_floating_point()
    again = next(iter(trained.evaluate().values()))
    assert again["loss"] == pytest.approx(result.results["LoRA"]["loss"], abs=1e-5)


def test_the_run_folder_tells_what_a_method_found_out(world, tmp_path):
    method = {"name": "adalora", "target_rank": 1, "init_rank": 3, "interval": 1}
    # At the end, and not at the best step, which may be one before the budget is down.
    keys = {"method": method, "max_steps": 12, "eval_steps": 6, "load_best_model_at_end": False}
    result = run(world, "bert", "labelled", tmp_path / "ranks", **keys)
    found = json.loads((tmp_path / "ranks" / "ranks.json").read_text())
    assert sum(found.values()) <= len(found) < 3 * len(found)
    assert result.pictures == ["ranks.png"]
    assert "![ranks.png](ranks.png)" in (tmp_path / "ranks" / "README.md").read_text()
    result = run(world, "bert", "labelled", tmp_path / "gates", method="unipelt")
    gates = json.loads((tmp_path / "gates" / "gates.json").read_text())
    assert all(0 < value < 1 for value in gates.values())
    assert (tmp_path / "gates" / "gates.png").stat().st_size > 1000


def test_in_bf16_the_trained_model_is_measured_not_a_copy_from_before(world, tmp_path):
    """Factors are kept in bf16 between forward passes, and the fused optimizer leaves no trace of its writes."""
    keys = {"bf16": True, "learning_rate": 0.05, "max_steps": 6, "load_best_model_at_end": False}
    result = run(world, "llama", "prompted", tmp_path / "run", generation_metrics=False, eval_samples=0, **keys)
    ours, untouched = result.results["LoRA"]["loss"], result.results["untouched"]["loss"]
    assert abs(ours - untouched) > 0.05
    again = next(iter(open_trained(tmp_path / "run").evaluate().values()))
    assert again["loss"] == pytest.approx(ours, abs=2e-3)


def test_packed_rows_train_as_rows_alone(world, tmp_path):
    result = run(world, "llama", "prompted", tmp_path / "run", packing=True, generation_metrics=False)
    assert result.state.rows > 4 * 8 * 2  # several rows in each sequence
    assert result.results["LoRA"]["loss"] < result.results["untouched"]["loss"]
