"""Each schedule against the one of transformers that has its name."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from inlay.errors import ConfigError
from inlay.train.schedules import FALLING, build_schedule, factor

TOTAL = 40


def theirs(name: str, warmup: int, settings: dict[str, float]) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, warmup, TOTAL, scheduler_specific_kwargs=settings)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule that steps without its optimizer
        for _ in range(TOTAL + 1):
            rates.append(schedule.get_last_lr()[0])
            schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("name", "ours", "them"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine", {"num_cycles": 1.5}, {"num_cycles": 1.5}),
        ("constant", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, {"min_lr_rate": 0.2}),
        ("polynomial", {"power": 2.0, "end_rate": 0.1}, {"power": 2.0, "lr_end": 0.1}),
        ("inverse_sqrt", {}, {}),
        ("inverse_sqrt", {"timescale": 12}, {"timescale": 12}),
    ],
)
def test_as_in_transformers(name, ours, them, warmup):
    rates = [factor(step, name=name, warmup=warmup, total=TOTAL, settings=ours) for step in range(TOTAL + 1)]
    assert rates == pytest.approx(theirs(name, warmup, them), abs=1e-12)


def test_warmup_stable_decay():
    rates = [
        factor(s, name="warmup_stable_decay", warmup=10, total=110, settings={"decay_ratio": 0.5}) for s in range(111)
    ]
    assert rates[5] == 0.5
    assert rates[10:61] == [1.0] * 51
    assert rates[85] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[60:]))


@pytest.mark.parametrize("name", [*FALLING, "inverse_sqrt"])
def test_a_setting_of_another_schedule_is_refused(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=f"lr_scheduler_kwargs: {name} does not take lr_end; it takes: "):
        build_schedule(optimizer, name, 0, TOTAL, {"lr_end": 0.1})


def test_every_name_of_the_configuration_is_there():
    from typing import get_args

    from inlay.config import Scheduler

    assert set(get_args(Scheduler)) == {*FALLING, "inverse_sqrt"}
