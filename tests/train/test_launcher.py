"""What `accelerate launch` says is done, or refused by name; nothing of it is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.errors import ConfigError
from inlay.train.launcher import launched, without_deepspeed
from inlay.train.session import open_accelerator
from train.engine import config


def ask(monkeypatch: pytest.MonkeyPatch, document: Any, folder: Path) -> None:
    file = folder / "zero.json"
    file.write_text(json.dumps(document))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))


def test_nothing_asked_changes_nothing():
    assert launched(config()) == (config(), None)


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": None}, {"bf16": True}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": False}, {"bf16": False}),  # what the user wrote wins
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"bf16": None}, {"fp16": True}),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"bf16": None}, {"bf16": None}),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, {"fsdp": True}),
    ],
)
def test_flags_of_the_launcher_become_keys(monkeypatch, variables, given, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found, zero = launched(config(**given))
    assert {key: getattr(found, key) for key in expected} == expected
    assert zero is None


def test_deepspeed_by_flags(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    _, zero = launched(config())
    assert zero is not None
    assert (zero.stage, dict(zero.settings)) == (3, {"stage": 3, "offload_param": {"device": "cpu"}})
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.3")
    with pytest.raises(ConfigError, match=r"gradient_clipping: 0\.3, the run max_grad_norm: 1\.0"):
        launched(config())


def test_deepspeed_by_file(monkeypatch, tmp_path):
    ask(monkeypatch, {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "steps_per_print": 5}, tmp_path)
    found, zero = launched(config(bf16=None))
    assert found.bf16
    assert zero is not None
    assert zero.stage == 3


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"optimizer": {"type": "AdamW"}}, "section 'optimizer', which has no effect"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "'activation_checkpointing', which has no effect"),
        ({"gradient_accumulation_steps": 4}, "says gradient_accumulation_steps: 4, the run .*: 1"),
        ({"train_micro_batch_size_per_gpu": 2}, "per_device_train_batch_size: 3"),
        ({"bf16": {"enabled": True}}, "asks for bf16, and the run for another precision"),
        ({"zero_optimization": {"stage": 7}}, "stage 7; expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "set optim: paged_adamw_32bit"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "only the device cpu"),
        ([], "holds no object"),
    ],
)
def test_what_would_have_no_effect_or_contradicts_is_refused(monkeypatch, tmp_path, document, told):
    ask(monkeypatch, document, tmp_path)
    with pytest.raises(ConfigError, match=told):
        launched(config())


def test_two_that_share_the_base_are_refused(monkeypatch, tmp_path):
    ask(monkeypatch, {"zero_optimization": {"stage": 3}}, tmp_path)
    with pytest.raises(ConfigError, match="fsdp: DeepSpeed is asked for too"):
        launched(config(fsdp=True))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        launched(config())


def test_accelerate_opens_without_deepspeeds_engine(monkeypatch):
    import os

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert open_accelerator(config(use_cpu=True)).num_processes == 1
    with without_deepspeed():
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
