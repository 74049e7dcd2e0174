"""LoRA, DoRA and AdaLoRA as one step of autograd against the plain form, in value, gradient and in what is kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import inlay
from inlay.hosts.leaf import LeafHost
from inlay.kernels import dropout
from inlay.kernels.lora import cast_once
from inlay.quant import NF4, quantize
from methods.oracle import randomise
from tiny import batch, tiny


def adalora(rank, alpha, **settings):
    return inlay.AdaLoRA(init_rank=rank, target_rank=rank, alpha=alpha, total_steps=1000, **settings)


METHODS = {"lora": inlay.LoRA, "dora": inlay.DoRA, "adalora": adalora}


def leaf(kind, inn=24, out=20, dtype=torch.float32, bias=True):
    torch.manual_seed(inn * out)
    if kind == "conv1d":
        made = Conv1D(out, inn)
        nn.init.normal_(made.bias)
    else:
        made = nn.Linear(inn, out, bias=bias)
    model = nn.Sequential(made).to(dtype)
    return quantize(model, NF4(skip=())) if kind == "linear4" else model


def plain(model):
    """The same model without its fused step."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, LeafHost) and module._inlay.plan is not None:
            module._inlay.plan.fused = None
    return model


def outcome(model, x, context):
    """Value, and gradients of x and of all parameters that are trained."""
    x = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    with context():
        y = model(x)
    weight = torch.randn(y.shape, generator=generator)
    (y.float() * weight).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.grad = None
    return y.detach(), x.grad, grads


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def attached(method, kind, inn=24, out=20, rank=3, dtype=torch.float32, bias=True, **settings):
    model = leaf(kind, inn, out, dtype, bias)
    made = METHODS[method](rank=rank, alpha=2 * rank, sites="0", **settings)
    randomise(inlay.attach(model, made, example={"input": torch.zeros(1, inn, dtype=dtype)}))
    assert model[0]._inlay.plan.fused is not None
    return model.train()


@settings(max_examples=25)
@given(
    method=st.sampled_from(list(METHODS)),
    kind=st.sampled_from(["linear", "conv1d", "linear4"]),
    lead=st.sampled_from([(), (1,), (5,), (2, 3), (0, 2)]),
    rank=st.integers(1, 5),
    precision=st.sampled_from(["fp32", "bf16", "autocast"]),
    bias=st.booleans(),
)
def test_equals_the_plain_form(method, kind, lead, rank, precision, bias):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = attached(method, kind, rank=rank, dtype=dtype, bias=bias)
    x = torch.randn(*lead, 24, generator=torch.Generator().manual_seed(rank)).to(dtype)
    context = autocast if precision == "autocast" else torch.enable_grad
    got, wanted = outcome(model, x, context), outcome(plain(model), x, context)
    # fp32 sums in another order; bf16 rounds between the steps that the plain form takes.
    close = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 3e-2, "atol": 0.15}
    assert got[0].dtype == wanted[0].dtype
    torch.testing.assert_close(got[0], wanted[0], **close)
    torch.testing.assert_close(got[1], wanted[1], **close)
    assert got[2].keys() == wanted[2].keys()
    for name, grad in got[2].items():
        torch.testing.assert_close(grad, wanted[2][name], **close, msg=name)
    with torch.no_grad(), context() if precision == "autocast" else torch.no_grad():
        torch.testing.assert_close(model(x), wanted[0], **close)


@pytest.mark.parametrize("method", list(METHODS))
def test_double_precision_gradients_are_the_derivatives(method):
    """x, A, B (and m, with n held constant as DoRA does) against finite differences."""
    model = attached(method, "linear", 5, 4, 2).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (piece,) = (p for p in model.modules() if type(p).__name__.endswith("RADelta"))
    if method == "dora":
        held = piece.norm().clone()
        piece.norm = lambda: held
    inputs = [x, *(p for p in piece.parameters())]
    assert torch.autograd.gradcheck(lambda *_: model(x), inputs)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_parts_of_a_fused_projection(family):
    model = tiny(family)
    randomise(inlay.attach(model, inlay.LoRA(rank=3, sites=("attn.q", "attn.v"))))
    inputs, other = batch(model), plain(model)
    for each in (model, other):
        each(**inputs).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_two_adapters_on_the_same_rows():
    model = attached("lora", "linear")
    randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="0"), name="b"), seed=5)
    inlay.use(model, ("default", "b"))
    assert model[0]._inlay.plan.fused is not None
    x = torch.randn(4, 24)
    for got, wanted in zip(
        outcome(model, x, torch.enable_grad), outcome(plain(model), x, torch.enable_grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def kept(call):
    """Bytes that autograd keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_three_projections_keep_one_x_and_their_low_products(precision, drop):
    """x in the dtype of the products, once; s for each; the weights; no mask, no second x."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 32, bias=False, dtype=dtype) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    model = Three()
    method = inlay.LoRA(rank=2, dropout=drop, sites=("q", "k", "v"))
    adapter = inlay.attach(model, method, example={"x": torch.zeros(1, 64, dtype=dtype)})
    model.train()
    x = torch.randn(512, 64, dtype=dtype, requires_grad=True)
    if drop and not dropout.supports(x):
        pytest.skip("no compiler here")
    weights = sum(p.nbytes for p in model.parameters())
    size = 4 if precision == "fp32" else 2
    with autocast() if precision == "autocast" else torch.enable_grad():
        assert kept(lambda: model(x)) == 512 * 64 * size + 3 * 512 * 2 * size + weights
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_the_first_adapted_layer_computes_no_gradient_of_its_input(monkeypatch):
    from inlay.kernels import gemm

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inlay.attach(model, inlay.LoRA(rank=2, sites=("0", "1")), example={"input": torch.zeros(1, 6)})
    calls, real = [], gemm.input_grad
    monkeypatch.setattr(gemm, "input_grad", lambda *a: calls.append(1) or real(*a))
    model.train()(torch.randn(3, 6)).sum().backward()
    assert len(calls) == 1


def test_weights_that_change_between_the_passes_are_noticed():
    model = attached("lora", "linear")
    loss = model(torch.randn(2, 24)).sum()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["train the weight", "train the bias", "functorch"])
def test_what_the_step_cannot_do_takes_the_plain_form(change):
    model = attached("lora", "linear")
    x = torch.randn(2, 24)
    if change == "functorch":
        got = torch.func.vmap(model)(x)
        torch.testing.assert_close(got, model(x))
        return
    name = "weight" if "weight" in change else "bias"
    getattr(model[0], name).requires_grad_()
    model(x).sum().backward()
    assert getattr(model[0], name).grad is not None


@pytest.mark.parametrize("method", list(METHODS))
def test_values_kept_without_gradients_follow_every_change(method):
    model = attached(method, "linear", dtype=torch.bfloat16).eval()
    (piece,) = (p for p in model.modules() if type(p).__name__.endswith("RADelta"))
    A, B = ("Lambda", "P") if method == "adalora" else ("A", "B")
    x = torch.randn(2, 24, dtype=torch.bfloat16)
    changes = [
        lambda: getattr(piece, B).mul_(2), lambda: setattr(getattr(piece, A), "data", getattr(piece, A).data * 2),
        lambda: model[0].bias.add_(1),
        lambda: model[0].weight.mul_(2),
    ]  # fmt: skip
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        for change in changes:
            change()
            now = model(x)
            assert not torch.equal(now, before)
            torch.testing.assert_close(now, plain(model)(x), rtol=3e-2, atol=0.15)
            before = now


def test_copies_and_pickles_have_steps_of_their_own():
    model = attached("lora", "linear")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step, (piece,) = twin[0]._inlay.plan.fused, (p for p in twin.modules() if type(p).__name__ == "LoRADelta")
        assert step.deltas == (piece,)


def test_one_copy_of_x_for_those_that_read_it():
    x = torch.randn(3, 4)
    first = cast_once(x, torch.bfloat16)
    assert cast_once(x, torch.bfloat16) is first
    x.add_(1)
    assert cast_once(x, torch.bfloat16) is not first
    torch.testing.assert_close(cast_once(x, torch.bfloat16).float(), x, rtol=1e-2, atol=1e-2)


class ActsInPlace(nn.Module):
    """2 f(x), written into what the projection returns, or beside it."""

    def __init__(self, project):
        super().__init__()
        self.project, self.in_place = project, True

    def forward(self, x):
        y = self.project(x)
        return y.mul_(2.0) if self.in_place else y * 2.0


@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64), (2, 3, 2, 64)])
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d", "packed"])
@pytest.mark.parametrize(
    "method", [inlay.LoRA(rank=4), inlay.LoRA(rank=4, dropout=0.5), inlay.DoRA(rank=4)], ids=["lora", "dropout", "dora"]
)
def test_models_may_go_on_in_place(method, kind, shape):
    """Autograd forbids writing into a view that a Function made, and models write into what projections return."""
    project = Conv1D(64, 64) if kind == "conv1d" else nn.Linear(64, 64, bias=kind != "without bias")
    model, x = ActsInPlace(project), torch.randn(shape)
    if kind == "packed":
        quantize(model, NF4())
    adapter = inlay.attach(model, method, example={"x": x})
    randomise(adapter)
    model.train()
    found = []
    for model.in_place in (True, False):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model(x).square().sum(), list(adapter.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
