"""Which library multiplies: both give the same numbers, and what a processor lacks is computed in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import inlay
from inlay.kernels import gemm
from inlay.quant import NF4, quantize
from methods.oracle import randomise

HALVES = (torch.bfloat16, torch.float16)
METHODS = {"lora": inlay.LoRA, "dora": inlay.DoRA}


@given(
    rows=st.integers(1, 70), inn=st.integers(1, 40), out=st.integers(1, 40), onednn=st.booleans(), bias=st.booleans()
)
def test_both_libraries_give_the_same_products(rows: int, inn: int, out: int, onednn: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows * inn + out)
    x, dy, w = (torch.randn(*shape, generator=generator) for shape in ((rows, inn), (rows, out), (out, inn)))
    b = torch.randn(out, generator=generator) if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "onednn_is_faster", lambda small: onednn)
        torch.testing.assert_close(gemm.linear(x, w, b), F.linear(x, w, b), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gemm.input_grad(dy, w), dy @ w, rtol=1e-5, atol=1e-5)


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A processor that multiplies fp32 only; the dtypes of the large products that follow."""
    seen: list[torch.dtype] = []
    for name in ("linear", "input_grad"):
        real = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda a, *rest, real=real: seen.append(a.dtype) or real(a, *rest))
    monkeypatch.setattr(gemm, "has_instructions", lambda dtype: False)
    return seen


def test_only_enough_rows_of_a_half_on_the_cpu_are_widened(
    without_instructions: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in HALVES:
        assert gemm.emulated(torch.ones(gemm.FEW, 8, dtype=dtype))
        assert not gemm.emulated(torch.ones(gemm.FEW - 1, 8, dtype=dtype))
        assert not gemm.emulated(torch.ones(64, 8, dtype=dtype, device="meta"))
    assert not gemm.emulated(torch.ones(64, 8))
    monkeypatch.setenv("INLAY_KERNELS", "off")
    assert not gemm.emulated(torch.ones(64, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_in_fp32_has_the_halves_at_its_ends_only(
    name: str, dtype: torch.dtype, packed: bool, without_instructions: list[torch.dtype]
) -> None:
    """Value and gradients are those of the same layer in double precision, up to the rounding of x, y and dx."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    if packed:
        quantize(model, NF4(skip=()))
    weight = model[0].weight if not packed else inlay.quant.linear.linear4(
        torch.eye(64), None, model[0].packed()
    ).t()  # fmt: skip
    exact = nn.Sequential(nn.Linear(64, 48))
    with torch.no_grad():
        exact[0].weight.copy_(weight)
        exact[0].bias.copy_(model[0].bias)
    x, dy = torch.randn(16, 64).to(dtype), torch.randn(16, 48).to(dtype)
    adapters, found = [], []
    for net, value in ((model, x), (exact.double(), x.double())):
        adapters.append(inlay.attach(net, METHODS[name](rank=4, sites="0"), example={"input": value[:1]}))
        randomise(adapters[-1])
    with torch.no_grad():
        for mine, other in zip(*(adapter.parameters() for adapter in adapters), strict=True):
            other.copy_(mine)
    for net, value, adapter in zip((model, exact), (x, x.double()), adapters, strict=True):
        leaf = value.clone().requires_grad_()
        y = net.train()(leaf)
        grads = torch.autograd.grad(y, [leaf, *adapter.parameters()], dy.to(y.dtype))
        found.append((y.detach(), *grads))
    ours, theirs = found
    assert without_instructions[:2] == [torch.float32, torch.float32]
    assert ours[0].dtype == ours[1].dtype == dtype
    rounding = torch.finfo(dtype).eps
    for mine, other in zip(ours, theirs, strict=True):
        error = (mine.double() - other.double()).norm() / other.double().norm()
        assert float(error) <= 2 * rounding
