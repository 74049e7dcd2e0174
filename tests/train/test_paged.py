"""Paged AdamW against torch's, bit for bit, and what the names of 8-bit optimizers give on this machine."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay.errors import ConfigError
from inlay.train import paged
from inlay.train.paged import PagedAdamW, make_adamw

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


class Staged(PagedAdamW):
    """Pages on the CPU as well, and watches how much is away from home at a time."""

    peak = 0

    def _pages(self, parameter: Tensor) -> bool:
        return parameter.numel() >= self.page_from

    def _batches(self, parameters: Any) -> Any:
        for batch in super()._batches(parameters):
            away = sum(m.nbytes for piece in batch if piece.homes for m in piece.moments)
            self.peak = max(self.peak, away)
            for piece in batch:
                for home, moment in zip(piece.homes, piece.moments, strict=bool(piece.homes)):
                    assert home.data_ptr() != moment.data_ptr()
            yield batch


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (150, 401), (64, 64), (123, 157), (5, 1000)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append(torch.randn(120, 100, generator=generator).t())  # memory with gaps when cut into ranges
    return [nn.Parameter(t.to(device, dtype)) for t in tensors]


def train(make: Callable[[Any], torch.optim.Optimizer], values: list[nn.Parameter], steps: int = 5) -> Any:
    optimizer = make([{"params": values[:3]}, {"params": values[3:], "lr": 3e-3, "weight_decay": 0.0}])
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, value in enumerate(values):
            gradient = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            value.grad = None if (step + i) % 4 == 3 else gradient  # not all parameters at every step
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 100_000, 10**9])
@pytest.mark.parametrize("page_from", [0, 15_000])
def test_bitwise_equal_to_torch(dtype: torch.dtype, budget: int, page_from: int) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = train(lambda g: Staged(g, **SETTINGS, budget=budget, page_from=page_from), ours)
    reference = train(lambda g: torch.optim.AdamW(g, **SETTINGS), theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][name], reference.state[b][name])
    assert 0 < optimizer.peak <= max(budget, 4096 * 8, 120 * 100 * 8)


def test_on_the_cpu_moments_are_not_copied() -> None:
    values = parameters()
    optimizer = train(lambda g: PagedAdamW(g, **SETTINGS), values, 1)
    before = optimizer.state[values[1]]["exp_avg"].data_ptr()
    optimizer.step()
    assert optimizer.state[values[1]]["exp_avg"].data_ptr() == before
    theirs = parameters()
    reference = train(lambda g: torch.optim.AdamW(g, **SETTINGS), theirs, 1)
    reference.step()
    assert all(torch.equal(a, b) for a, b in zip(values, theirs, strict=True))


@pytest.mark.parametrize("source", [torch.optim.AdamW, Staged, PagedAdamW])
@pytest.mark.parametrize("target", [torch.optim.AdamW, Staged, PagedAdamW])
def test_state_passes_between_all_of_them(source: Any, target: Any) -> None:
    first = parameters()
    state = copy.deepcopy(train(lambda g: source(g, **SETTINGS), first).state_dict())
    copies = [nn.Parameter(value.detach().clone()) for value in first]

    def resumed(groups: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = target(groups, lr=9.0)
        optimizer.load_state_dict(copy.deepcopy(state))  # torch keeps the tensors of the file
        return optimizer

    continued, expected = copies, [nn.Parameter(value.detach().clone()) for value in first]
    train(resumed, continued)

    def reference(groups: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, lr=9.0)
        optimizer.load_state_dict(copy.deepcopy(state))  # torch keeps the tensors of the file
        return optimizer

    train(reference, expected)
    assert all(torch.equal(a, b) for a, b in zip(continued, expected, strict=True))


def test_loading_does_not_share_memory_with_the_file() -> None:
    values = parameters()
    optimizer = train(lambda g: PagedAdamW(g, **SETTINGS), values, 1)
    state = optimizer.state_dict()
    other = PagedAdamW([{"params": values[:3]}, {"params": values[3:]}])
    other.load_state_dict(state)
    assert other.state[values[1]]["exp_avg"].data_ptr() != state["state"][1]["exp_avg"].data_ptr()


def test_scheduler_closure_and_hooks_work() -> None:
    value = nn.Parameter(torch.ones(4))
    optimizer = PagedAdamW([value], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    scheduler.step()
    assert seen == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(value.detach(), torch.zeros(4), atol=1e-6, rtol=0)


def test_refusals() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        PagedAdamW(embedding.parameters()).step()
    with pytest.raises(ConfigError, match="budget"):
        PagedAdamW([nn.Parameter(torch.ones(1))], budget=0)


def test_names() -> None:
    values = [nn.Parameter(torch.randn(100, 100))]
    assert type(make_adamw("paged_adamw_32bit", values, **SETTINGS)) is PagedAdamW
    with pytest.raises(ConfigError, match="adamw_4bit"):
        make_adamw("adamw_4bit", values)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_state_on_the_cpu(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    values, exact = [nn.Parameter(torch.ones(100, 100))], [nn.Parameter(torch.ones(100, 100))]
    optimizer = make_adamw(name, [{"params": values}], **SETTINGS)
    reference = torch.optim.AdamW(exact, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        values[0].grad = torch.randn(100, 100, generator=generator)
        exact[0].grad = values[0].grad.clone()
        optimizer.step()
        reference.step()
    assert optimizer.state[values[0]]["state1"].dtype is torch.uint8
    moved = (exact[0] - 1).norm()
    assert 0 < (values[0] - exact[0]).norm() < 0.2 * moved


def test_eight_bit_without_bitsandbytes_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert paged.importlib is importlib
    with pytest.raises(ConfigError, match=r"inlay\[bnb\].*paged_adamw_32bit works without it"):
        make_adamw("adamw_8bit", [nn.Parameter(torch.ones(3))])


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [100_000, 10**9])
def test_bitwise_equal_to_torch_on_a_gpu(budget: int) -> None:
    ours, theirs = parameters(device="cuda"), parameters(device="cuda")
    optimizer = train(lambda g: PagedAdamW(g, **SETTINGS, budget=budget, page_from=1000), ours)
    train(lambda g: torch.optim.AdamW(g, **SETTINGS), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    moment = optimizer.state[ours[1]]["exp_avg"]
    assert moment.device.type == "cpu"
    assert moment.is_pinned()
