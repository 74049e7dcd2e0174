"""Cross-entropy in pieces against the plain form, in value, gradient and memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from inlay.kernels.cross_entropy import linear_cross_entropy


@settings(max_examples=30)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(2, 12),
    piece=st.sampled_from([1, 20, 10**6]),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    bias=st.booleans(),
    precision=st.sampled_from(["fp64", "fp32", "bf16", "autocast"]),
)
def test_equals_the_plain_form(monkeypatch_fewest, tokens, vocabulary, piece, smoothing, weighted, bias, precision):
    generator = torch.Generator().manual_seed(tokens * 13 + vocabulary)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    h, W, b, w = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((tokens, 6), (vocabulary, 6), (vocabulary,), (tokens,))
    )
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    w = w.abs().to(torch.promote_types(dtype, torch.float32))
    h.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = F.linear(h, W, b if bias else None)
        got = linear_cross_entropy(
            h, W, b if bias else None, labels, smoothing=smoothing, weights_N=w if weighted else None, piece=piece
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    wanted = (loss * w).sum() if weighted else loss.sum()
    close = {"rtol": 1e-5, "atol": 1e-6} if precision in ("fp64", "fp32") else {"rtol": 2e-2, "atol": 3e-2}
    torch.testing.assert_close(got.loss_N, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.total, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.right_N, logits.argmax(-1) == labels)
    (mine,) = torch.autograd.grad(got.total * 0.5, h)
    (theirs,) = torch.autograd.grad(wanted * 0.5, h)
    torch.testing.assert_close(mine, theirs, **close)


@pytest.fixture(scope="module")
def monkeypatch_fewest():
    """Pieces of one row, so that several are needed."""
    patch = pytest.MonkeyPatch()
    patch.setattr("inlay.kernels.cross_entropy.FEWEST", 1)
    # Products in fp32 that are rounded differ from torch's own now and then in the last bit.
    patch.setattr("inlay.kernels.gemm.has_instructions", lambda dtype: True)
    yield
    patch.undo()


def test_a_processor_without_bf16_gives_the_same_up_to_rounding(monkeypatch):
    monkeypatch.setattr("inlay.kernels.gemm.has_instructions", lambda dtype: False)
    generator = torch.Generator().manual_seed(0)
    h, W = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, 16), (50, 16)))
    labels = torch.randint(50, (40,), generator=generator)
    h.requires_grad_()
    got = linear_cross_entropy(h, W, None, labels, piece=600)
    wanted = F.cross_entropy(F.linear(h.double(), W.double()), labels, reduction="sum")
    (mine,), (theirs,) = torch.autograd.grad(got.total, h), torch.autograd.grad(wanted, h)
    torch.testing.assert_close(got.total.double(), wanted, rtol=1e-2, atol=1e-2)
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-2


def test_derivatives():
    h = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    W, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 4, 4, 2])
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, W, None, labels, smoothing=0.2).total, [h])


def test_only_the_gradient_of_the_input_is_kept():
    h, W = torch.randn(64, 16, requires_grad=True), torch.randn(1000, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        linear_cross_entropy(h, W, None, torch.zeros(64, dtype=torch.long))
    assert sum(kept) == h.nbytes


def test_extreme_logits_stay_finite():
    h = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    W, labels = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1, 1])
    found = linear_cross_entropy(h, W, None, labels)
    assert found.loss_N.tolist() == [2e4, 0.0]
    found.total.backward()
    assert torch.isfinite(h.grad).all()


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pieces_through_triton(monkeypatch, weighted, smoothing):
    """What a GPU would run, interpreted, against the plain form."""
    pytest.importorskip("triton")
    from inlay.kernels import triton_cross_entropy as kernel
    from inlay.kernels import triton_select

    h, W, bias = (torch.randn(*s) for s in ((70, 8), (50, 8), (50,)))
    labels, w = torch.randint(50, (70,)), torch.rand(70)
    h.requires_grad_()
    calls, real = [], kernel.cross_entropy_
    monkeypatch.setattr(kernel, "cross_entropy_", lambda *a: calls.append(1) or real(*a))
    found = []
    for usable in (True, False):
        monkeypatch.setattr(triton_select, "usable", lambda *tensors, usable=usable: usable)
        got = linear_cross_entropy(
            h, W, bias, labels, smoothing=smoothing, weights_N=w if weighted else None, piece=32 * 50
        )
        found.append((got.total.detach(), got.loss_N, got.right_N, *torch.autograd.grad(got.total * 0.5, h)))
    assert len(calls) == 3
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
