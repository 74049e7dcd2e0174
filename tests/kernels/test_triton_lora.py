"""A projection with LoRA as one function against autograd on the plain form, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

from transformers.pytorch_utils import Conv1D

import inlay
from inlay.kernels import triton_lora, triton_select
from inlay.kernels.triton_lora import lora_linear, lora_linear_plain
from inlay.kernels.triton_products import Mask, Tile
from inlay.quant import NF4, quantize, weight_of

pytestmark = pytest.mark.usefixtures("natively")

I, O, R = 64, 40, 4


@pytest.fixture(params=["plain products", "fused products", "last form"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form in turn, whatever is faster."""
    place = {"plain products": 0, "fused products": 1, "last form": -1}[request.param]

    def fixed(key: object, candidates: list[Callable[[], Tensor]]) -> Tensor:
        return candidates[place]()

    monkeypatch.setattr(triton_lora, "fastest", fixed)
    monkeypatch.setattr(triton_lora, "FP32_TILES", (Tile(16, 32, 32, 4, 1),))
    triton_select.forget()


def parts(packed: bool) -> tuple[Tensor, Tensor, object]:
    """x, the dense weight, and the weight as `lora_linear` takes it."""
    x = torch.randn(2, 9, I)
    linear = nn.Linear(I, O, bias=False)
    if not packed:
        return x, linear.weight.detach(), linear.weight.detach()
    (layer,) = quantize(nn.Sequential(linear), NF4())
    return x, layer.quant_state and _dense(layer), layer.packed()


def _dense(layer: nn.Module) -> Tensor:
    return weight_of(layer).float()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True])
def test_value_and_gradients(form: None, p: float, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, weight = parts(packed)
    seed = torch.tensor([123456789])
    monkeypatch.setattr(triton_lora, "draw_seed", lambda device: seed)
    leaves = [x, torch.randn(O), torch.randn(R, I), torch.randn(O, R)]
    ours = [t.clone().requires_grad_() for t in leaves]
    plain = [t.clone().requires_grad_() for t in leaves]
    y = lora_linear(ours[0], weight, *ours[1:], 0.5, p)
    truth = lora_linear_plain(plain[0], w, *plain[1:], 0.5, Mask(seed, p) if p else None)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    truth.backward(dy)
    for name, a, b in zip(("x", "bias", "A", "B"), ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_kept_for_backward_are_x_and_small_things_only(form: None) -> None:
    x, _, weight = parts(False)
    x.requires_grad_()
    A, B = torch.randn(R, I, requires_grad=True), torch.randn(O, R, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lora_linear(x, weight, None, A, B, 1.0, 0.5)
    for known in (x, weight, A, B):
        kept.pop(known.data_ptr(), None)
    assert sum(kept.values()) == 18 * R * 4 + 8  # s and the seed


def test_an_input_without_gradient_costs_no_product(form: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, weight = parts(False)
    monkeypatch.setattr(triton_lora, "input_grad", lambda *_: pytest.fail("dx was computed"))
    A, B = torch.randn(R, I, requires_grad=True), torch.randn(O, R, requires_grad=True)
    lora_linear(x, weight, None, A, B, 1.0).sum().backward()
    assert A.grad is not None
    assert B.grad is not None


@pytest.mark.parametrize("leaf", ["linear", "conv1d", "packed"])
def test_a_hosted_projection_goes_through_it(form: None, leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Conv1D(O, I) if leaf == "conv1d" else nn.Linear(I, O))
    if leaf == "packed":
        quantize(model, NF4())
    x, seed = torch.randn(7, I), torch.tensor([5])
    adapter = inlay.attach(model, inlay.LoRA(rank=R, dropout=0.5, sites="0"), example={"input": x})
    A, B = adapter.parameters()
    nn.init.normal_(B)
    w, bias = weight_of(model[0]).float(), model[0].bias
    truth = lora_linear_plain(x, w, bias, A, B, 4.0, Mask(seed, 0.5))
    monkeypatch.setattr(triton_select, "usable", lambda *_: True)
    monkeypatch.setattr(triton_lora, "draw_seed", lambda _: seed)
    torch.testing.assert_close(model.train()(x), truth, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x), lora_linear_plain(x, w, bias, A, B, 4.0, None), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_under_autocast_a_weight_of_another_dtype_is_left_to_other_steps(
    form: None, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where x comes in bf16 from the projection before, and the weight is still in fp32."""
    model = nn.Sequential(nn.Linear(I, O))
    x = torch.randn(7, I).bfloat16()
    with torch.autocast(x.device.type, torch.bfloat16):
        adapter = inlay.attach(model, inlay.LoRA(rank=R, dropout=p, sites="0"), example={"input": x})
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        monkeypatch.setattr(triton_select, "usable", lambda *_: True)
        model.train(p > 0)
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(q.grad.isfinite().all() and q.grad.any() for q in adapter.parameters())


def test_under_autocast_in_the_dtype_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `inlay train` runs: a frozen base in bf16, masters in fp32."""
    monkeypatch.setattr(triton_lora, "fastest", lambda key, candidates: candidates[0]())
    triton_select.forget()
    x, w = torch.randn(7, I).bfloat16(), torch.randn(O, I).bfloat16()
    made = []
    for autocast in (False, True):
        leaves = [
            x.clone().requires_grad_(),
            torch.ones(R, I, requires_grad=True),
            torch.ones(O, R, requires_grad=True),
        ]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            assert triton_lora.fits(leaves[0], w)
            y = lora_linear(leaves[0], w, None, *leaves[1:], 0.5)
            y.backward(torch.ones_like(y))
        made.append([y.detach(), *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*made, strict=True))


def test_what_fits() -> None:
    x, w = torch.zeros(2, I), torch.zeros(O, I)
    assert triton_lora.fits(x, w)
    assert not triton_lora.fits(x, w.bfloat16())
    assert not triton_lora.fits(x.double(), w.double())
    assert not triton_lora.fits(x, w.requires_grad_())
    with torch.autocast(x.device.type, torch.bfloat16):
        assert not triton_lora.fits(x, w.detach())
