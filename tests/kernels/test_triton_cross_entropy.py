"""The cross-entropy kernel against autograd on torch's own, run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from inlay.kernels import triton_cross_entropy as kernel

pytestmark = pytest.mark.usefixtures("natively")


@pytest.mark.parametrize("form", [kernel.cross_entropy_, kernel.cross_entropy_plain_])
@settings(max_examples=8)
@given(
    n=st.integers(0, 5),
    V=st.sampled_from([1, 7, 64, 9000]),
    smoothing=st.sampled_from([0.0, 0.1]),
    high=st.sampled_from([1.0, 300.0]),
)
def test_loss_gradient_and_first_choice(form: object, n: int, V: int, smoothing: float, high: float) -> None:
    torch.manual_seed(n + V)
    logits, weights = torch.randn(n, V) * high, torch.rand(n)
    labels = torch.randint(0, V, (n,))
    labels[1::3] = -100
    z = logits.double().requires_grad_()
    expected = F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    (expected * weights).sum().backward()
    chunk = logits.clone()
    losses, firsts = form(chunk, labels, weights, smoothing)  # type: ignore[operator]
    torch.testing.assert_close(losses, expected.detach().float(), rtol=1e-5, atol=1e-5)
    # exp(z - lse) has the error that fp32 leaves in z and lse, which are as large as the logits.
    torch.testing.assert_close(chunk, z.grad.float(), rtol=1e-6 * high + 1e-5, atol=1e-6)
    assert torch.equal(firsts, logits.argmax(1))


def test_forbidden_tokens_and_equal_logits() -> None:
    logits = torch.tensor([[float("-inf"), 2.0, 2.0, 1.0]])
    chunk = logits.clone()
    losses, firsts = kernel.cross_entropy_(chunk, torch.tensor([1]), torch.ones(1))
    assert firsts.item() == 1
    torch.testing.assert_close(losses, F.cross_entropy(logits, torch.tensor([1]), reduction="none"))
    torch.testing.assert_close(chunk, torch.softmax(logits, 1) - torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits, labels = torch.randn(3, 2000).bfloat16(), torch.tensor([5, 0, 1999])
    losses, _ = kernel.cross_entropy_(logits.clone(), labels, torch.ones(3))
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), labels, reduction="none"), rtol=1e-6, atol=1e-5)
