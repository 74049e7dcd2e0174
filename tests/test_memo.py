"""A remembered value is made again when what it came from changes, and only then."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from inlay.memo import Memo, versions


def test_makes_again_only_what_changed():
    memo, made = Memo(), []
    weight = nn.Parameter(torch.ones(3))

    def get():
        return memo.get(lambda: versions(weight), lambda: made.append(1) or weight.detach().sum())

    assert float(get()) == float(get()) == 3.0
    assert len(made) == 1
    with torch.no_grad():
        weight.add_(1.0)
    assert float(get()) == 6.0
    weight.data = torch.zeros(3)
    assert float(get()) == 0.0
    weight.grad = torch.ones(3)
    torch.optim.SGD([weight], lr=1.0).step()
    assert float(get()) == -3.0
    assert len(made) == 4


def test_a_copy_starts_empty():
    memo = Memo()
    memo.get(lambda: (1,), lambda: torch.ones(2))
    for twin in (copy.deepcopy(memo), pickle.loads(pickle.dumps(memo))):
        assert twin.get(lambda: (1,), lambda: "again") == "again"


def test_nothing_is_kept_inside_a_compiled_graph():
    """A counter that Python keeps would become a constant of the graph."""
    memo, weight = Memo(), torch.ones(3)

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(x):
        return memo.get(lambda: versions(x), lambda: x * 2)

    for value in (1.0, 2.0, 3.0):
        assert torch.equal(doubled(weight * value), weight * value * 2)


def test_versions_count_optimizer_steps_from_the_first_one_on(monkeypatch):
    """Fused optimizers write without a trace; without the hook a cache would keep what was before the first step."""
    started = []
    monkeypatch.setattr("inlay.stepping.start", lambda: started.append(True))
    versions(torch.zeros(1))
    assert started
