"""Parameter groups and optimizers by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import inlay
from inlay.config import Optimizer
from inlay.errors import MethodError
from inlay.train.optim import build_optimizer, parameter_groups, warmup_steps
from tiny import tiny
from train.engine import HeadAdapter, Net, config


def test_matrices_decay_and_vectors_do_not():
    adapter = HeadAdapter(Net())
    groups = parameter_groups(adapter, config(weight_decay=0.1, learning_rate=0.3))
    assert [(g["weight_decay"], g["lr"], [p.ndim for p in g["params"]]) for g in groups] == [
        (0.1, 0.3, [2]),
        (0.0, 0.3, [1]),
    ]


def test_lora_plus_raises_the_rate_of_every_b_and_of_nothing_else():
    model = tiny("bert", "cls")
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    groups = parameter_groups(adapter, config(learning_rate=0.01, loraplus_lr_ratio=16.0))
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    named = dict(adapter.named_parameters())
    assert len(rates) == len(named)
    for name, parameter in named.items():
        assert rates[id(parameter)] == pytest.approx(0.16 if name.endswith(".B") else 0.01), name


def test_a_method_fixes_rates_of_its_own_and_the_runs_own_comes_first():
    adapter = inlay.attach(tiny("bert", "cls"), inlay.DiffPruning(sites="attn.q", gate_lr=0.1))
    groups = parameter_groups(adapter, config(learning_rate=1e-4, weight_decay=0.01))
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert groups[0]["lr"] == 1e-4
    for name, parameter in adapter.named_parameters():
        gate = name.rpartition(".")[2] in ("gate", "group")
        assert rates[id(parameter)] == (0.1 if gate else 1e-4), name
        assert decays[id(parameter)] == (0.01 if parameter.ndim > 1 and not gate else 0.0), name


def test_adalora_is_kept_from_weight_decay_and_the_head_beside_it_is_not():
    adapter = inlay.attach(tiny("bert", "cls"), inlay.AdaLoRA(total_steps=20))
    groups = parameter_groups(adapter, config(weight_decay=0.01))
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, parameter in adapter.named_parameters():
        factor = name.rpartition(".")[2] in ("P", "Lambda", "Q")
        assert decays[id(parameter)] == (0.01 if parameter.ndim > 1 and not factor else 0.0), name


def test_lora_plus_without_a_b_is_an_error():
    adapter = inlay.attach(tiny("bert", "cls"), inlay.BitFit())
    with pytest.raises(MethodError, match=r"LoRA\+ raises the learning rate of B"):
        parameter_groups(adapter, config(loraplus_lr_ratio=16.0))


@pytest.mark.parametrize("name", [n for n in get_args(Optimizer) if not n.startswith("paged") and n != "adamw_8bit"])
def test_every_optimizer_takes_a_step_downhill(name):
    adapter = HeadAdapter(Net())
    optimizer = build_optimizer(adapter, config(optim=name, learning_rate=0.001, weight_decay=0.0))
    target = torch.ones(16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (adapter.model.head(target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({"warmup_ratio": 0.06}, 6), ({"warmup_ratio": None, "warmup_steps": 17}, 17), ({"warmup_ratio": None}, 0)],
)
def test_warmup(keys, expected):
    assert warmup_steps(config(**keys), 100) == expected
