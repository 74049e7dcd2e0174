"""The seeded mask: the C form against the plain one, its statistics, its gradients, and what it repeats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.kernels import dropout
from inlay.kernels.dropout import Mask
from methods.oracle import randomise

pytestmark = pytest.mark.skipif(not dropout.supports(torch.zeros(1)), reason="no compiler here")


@settings(max_examples=25)
@given(
    low=st.integers(0, 2**32 - 1),
    high=st.integers(0, 2**32 - 1),
    p=st.floats(0.0, 0.99),
    n=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    add=st.booleans(),
)
def test_equals_the_plain_form(low, high, p, n, dtype, add):
    mask = Mask(low, high, p)
    x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    wanted = (x.float() / (1 - p)) * dropout.keeps(mask, n)
    if add:
        wanted = y.float() + wanted
    got = dropout.apply(x, mask, y.clone() if add else None)
    torch.testing.assert_close(got, wanted.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_drop_the_right_share_and_are_independent(p):
    n = 1 << 18
    torch.manual_seed(0)
    a, b = (dropout.keeps(dropout.draw(p), n) for _ in range(2))
    neighbour = dropout.keeps(Mask(1, 0, p), n), dropout.keeps(Mask(2, 0, p), n)
    five_sigma = 5 * (p * (1 - p) / n) ** 0.5
    assert abs(float((~a).float().mean()) - p) < five_sigma
    for u, v in ((a, b), (a[:-1], a[1:]), (a[:-64], a[64:]), (a[1:], b[:-1]), neighbour):
        both = float((~u & ~v).float().mean())
        assert abs(both - p * p) < 6 * (p * p * (1 - p * p) / n) ** 0.5


def layer(rate):
    model = nn.Sequential(nn.Linear(16, 12))
    randomise(inlay.attach(model, inlay.LoRA(rank=3, dropout=rate, sites="0"), example={"input": torch.zeros(1, 16)}))
    return model.train()


def test_gradients_belong_to_the_mask_of_the_forward_pass():
    model, x = layer(0.4), torch.randn(7, 16, requires_grad=True)
    (piece,) = (p for p in model.modules() if type(p).__name__ == "LoRADelta")
    torch.manual_seed(5)
    mask = dropout.draw(0.4)
    torch.manual_seed(5)
    y = model(x)
    direction = torch.randn_like(y)
    got = torch.autograd.grad((y * direction).sum(), [x, piece.A, piece.B])
    kept = x * dropout.keeps(mask, x.numel()).view_as(x) / 0.6
    wanted = nn.functional.linear(x, model[0].weight, model[0].bias) + piece.scale * kept @ piece.A.T @ piece.B.T
    torch.testing.assert_close(y, wanted)
    for mine, theirs in zip(got, torch.autograd.grad((wanted * direction).sum(), [x, piece.A, piece.B]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_seed_repeats_and_checkpointing_computes_the_same_mask_again():
    model, x = layer(0.4), torch.randn(7, 16, requires_grad=True)
    grads = []
    for run in (model, model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(9)
        y = run(x)
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert not torch.equal(model(x), model(x)), "each pass draws anew"
