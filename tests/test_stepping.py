"""What acts around optimizer steps: once a step, for the optimizers that hold its parameters, whatever the loop."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from inlay import stepping
from inlay.errors import MethodError


class Counter(stepping.Stepped, nn.Module):
    """Adds 1 to every gradient before a step and counts."""

    def __init__(self, count=2):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(count)])
        self.before, self.after, self.scales = 0, 0, []
        stepping.watch(self)

    def stepped_parameters(self):
        return iter(self.weights)

    def before_step(self, grad_scale):
        self.before += 1
        self.scales.append(float(grad_scale))
        for weight in self.weights:
            weight.grad = weight.grad + 1.0 * grad_scale

    def after_step(self, grad_scale):
        self.after += 1


def backward(counter):
    sum(w.sum() for w in counter.weights).backward()


def test_acts_once_a_step_and_the_gradient_counts():
    counter = Counter()
    optimizer = torch.optim.SGD(counter.parameters(), lr=1.0)
    for _ in range(3):
        backward(counter)
    optimizer.step()
    assert (counter.before, counter.after) == (1, 1)
    torch.testing.assert_close(counter.weights[0].detach(), torch.full((2,), -4.0))


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_makes_the_gradients_first(keyword):
    counter = Counter()
    optimizer = torch.optim.SGD(counter.parameters(), lr=1.0)

    def closure():
        optimizer.zero_grad()
        backward(counter)
        return torch.tensor(5.0)

    result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert float(result) == 5.0
    torch.testing.assert_close(counter.weights[0].detach(), torch.full((2,), -2.0))
    assert (counter.before, counter.after) == (1, 1)


def test_what_was_prepared_for_clipping_is_not_done_again():
    counter = Counter()
    optimizer = torch.optim.SGD(counter.parameters(), lr=1.0)
    for step in range(1, 3):
        optimizer.zero_grad()
        backward(counter)
        stepping.prepare(optimizer)
        assert all(bool((w.grad == 2.0).all()) for w in counter.weights)
        nn.utils.clip_grad_norm_(counter.parameters(), 1.0)
        optimizer.step()
        assert (counter.before, counter.after) == (step, step)
    assert torch.allclose(torch.cat(list(counter.weights)).norm(), torch.tensor(2.0))
    optimizer.zero_grad()
    backward(counter)
    optimizer.step()  # nothing was prepared, so the hook does it
    assert counter.before == 3


def test_a_fused_optimizer_divides_by_the_scale_itself():
    counter = Counter()
    optimizer = torch.optim.SGD(counter.parameters(), lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(w.sum() for w in counter.weights)).backward()
    scaler.step(optimizer)
    assert counter.scales == [8.0]
    torch.testing.assert_close(counter.weights[0].detach(), torch.full((2,), -2.0))


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_does_not_count(fused):
    counter = Counter()
    optimizer = torch.optim.SGD(counter.parameters(), lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(w.sum() for w in counter.weights)).backward()
    counter.weights[0].grad[0] = torch.nan
    scaler.step(optimizer)
    assert (counter.before, counter.after) == (0, 0)


def test_a_step_without_gradients_for_it_does_not_count():
    one, other = Counter(), Counter()
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=1.0)
    backward(one)
    optimizer.step()
    assert (one.before, one.after, other.before, other.after) == (1, 1, 0, 0)


def test_another_optimizer_is_none_of_its_business():
    counter, linear = Counter(), nn.Linear(2, 2)
    backward(counter)
    linear(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=1.0).step()
    assert (counter.before, counter.after) == (0, 0)


def test_half_of_the_parameters_is_refused_before_anything_moves():
    counter = Counter()
    backward(counter)
    with pytest.raises(MethodError, match="1 of its 2 parameters"):
        torch.optim.SGD([counter.weights[0]], lr=1.0).step()
    assert not counter.weights[0].any()
    counter.weights[1].requires_grad_(False)
    torch.optim.SGD([counter.weights[0]], lr=1.0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_live(clone):
    counter = Counter()
    twin = clone(counter)
    backward(twin)
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert (counter.after, twin.after) == (0, 1)


def test_it_ends_with_its_module():
    gc.collect()
    before = len(stepping._watched)
    counter = Counter()
    assert len(stepping._watched) == before + 1
    del counter
    gc.collect()
    assert len(stepping._watched) == before


def test_every_step_of_any_optimizer_is_counted():
    stepping.start()
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = stepping.count()
    weight.grad = torch.ones(1)
    optimizer.step()
    assert stepping.count() == before + 1
