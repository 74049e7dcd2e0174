"""What a run computes in, and how the frozen weights are kept."""

from __future__ import annotations

import pytest
import torch

from inlay.train.precision import autocast, faster_in_bf16, resolve_dtype, resolve_precision
from train.engine import config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("keys", "method", "stored", "expected"),
    [
        ({"bf16": True}, "lora", torch.float32, "bfloat16"),
        ({"bf16": True}, "lora", None, "bfloat16"),
        ({"bf16": True}, "full", torch.float32, "float32"),
        ({"bf16": True}, "lora+diffpruning", None, "auto"),
        ({"bf16": False}, "lora", torch.float32, "float32"),
        ({"bf16": False}, "lora", torch.bfloat16, "bfloat16"),
        ({"bf16": False}, "lora", torch.float16, "float32"),
        ({"bf16": True, "dtype": "float32"}, "lora", torch.bfloat16, "float32"),
    ],
)
def test_how_frozen_weights_are_kept(keys, method, stored, expected, monkeypatch):
    monkeypatch.setattr("inlay.train.precision.has_instructions", lambda dtype: dtype is not torch.float16)
    assert resolve_dtype(config(**keys), method, stored, CPU).dtype == expected


def test_weights_that_the_processor_cannot_multiply_are_widened_unless_a_dtype_is_named(monkeypatch):
    monkeypatch.setattr("inlay.train.precision.has_instructions", lambda dtype: dtype is torch.float32)
    assert resolve_dtype(config(bf16=False), "lora", torch.bfloat16, CPU).dtype == "float32"
    assert resolve_dtype(config(bf16=False), "lora", torch.bfloat16, torch.device("cuda")).dtype == "bfloat16"
    assert resolve_dtype(config(bf16=False, dtype="bfloat16"), "lora", torch.bfloat16, CPU).dtype == "bfloat16"


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_measured_once_and_only_when_nothing_is_said(monkeypatch, fast):
    measured = []
    monkeypatch.setattr("inlay.train.precision.faster_in_bf16", lambda device: measured.append(device) or fast)
    assert resolve_precision(config(bf16=None), CPU).bf16 is fast
    assert resolve_precision(config(bf16=True), CPU).bf16 is True
    assert resolve_precision(config(bf16=False), CPU).bf16 is False
    assert resolve_precision(config(bf16=None, fp16=True), CPU).bf16 is False
    assert measured == [CPU]


def test_the_measurement_draws_no_random_numbers():
    torch.manual_seed(3)
    faster_in_bf16(CPU)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast(bf16, dtype):
    with autocast(config(bf16=bf16), CPU):
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == dtype
