"""`Linear4`: values, gradients, what it saves, and what users do to a module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inlay.errors import QuantizationError
from inlay.kernels import blocks4_product, gemm
from inlay.quant import FP4, NF4, Linear4, quantize, weight_of
from inlay.quant.base import BlockQuantization

OUT, IN = 96, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def packed(config: BlockQuantization | None = None, layer: nn.Linear | None = None) -> Linear4:
    result = quantize(nn.Sequential(layer or dense()), config or NF4())[0]
    assert isinstance(result, Linear4)
    return result


def theirs(layer: nn.Linear, quant_type: str, double_quant: bool) -> bnb.nn.Linear4bit:
    result = bnb.nn.Linear4bit(
        IN, OUT, bias=layer.bias is not None, quant_type=quant_type, compress_statistics=double_quant
    )
    result.weight = bnb.nn.Params4bit(
        layer.weight.data.clone(), quant_type=quant_type, compress_statistics=double_quant, module=result
    )
    if layer.bias is not None:
        result.bias = nn.Parameter(layer.bias.data.clone())
    return result.to("cpu")


@pytest.fixture
def decoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a decoded weight: the same bits as torch's own. Others differ in the order of sums."""
    monkeypatch.setattr(blocks4_product, "best_form", lambda dtype: None)
    monkeypatch.setattr(gemm, "has_instructions", lambda dtype: True)


@pytest.mark.usefixtures("decoded_first")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [NF4(), NF4(double_quant=False), FP4()], ids=str)
def test_values_gradients_and_state_are_those_of_bitsandbytes(config: BlockQuantization, dtype: torch.dtype) -> None:
    layer = dense(dtype)
    peer = theirs(layer, config.quant_type, config.double_quant)
    ours = packed(config, layer)
    state, expected = ours.state_dict(), peer.state_dict()
    assert list(state) == list(expected)
    for key in expected:
        assert state[key].dtype == expected[key].dtype
        assert torch.equal(state[key], expected[key]), key
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, OUT, dtype=dtype)
    y, y_peer = ours(x), peer(x)
    assert torch.equal(y, y_peer)
    dx, db = torch.autograd.grad(y, (x, ours.bias), dy)
    assert torch.equal(dx, torch.autograd.grad(y_peer, x, dy)[0])
    torch.testing.assert_close(db, dy.sum((0, 1)))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), y)


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("bias_grad", [True, False])
def test_only_the_gradients_that_are_needed(input_grad: bool, bias_grad: bool) -> None:
    layer = packed()
    layer.bias.requires_grad_(bias_grad)
    x = torch.randn(3, IN, requires_grad=input_grad)
    y = layer(x)
    assert y.requires_grad == (input_grad or bias_grad)
    if y.requires_grad:
        y.sum().backward()
    assert (x.grad is not None) == input_grad
    assert (layer.bias.grad is not None) == bias_grad
    assert layer.weight.grad is None


def test_autograd_saves_nothing_but_the_packed_weight() -> None:
    layer = packed()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(64, IN, requires_grad=True))
    own = {t.data_ptr() for t in (layer.weight, *layer.buffers())}
    assert saved
    assert {t.data_ptr() for t in saved} <= own


def test_layers_do_not_share_results_through_the_scratch_buffer() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN), nn.Tanh(), nn.Linear(IN, OUT))
    quantize(chain)
    reference = copy.deepcopy(chain)
    for i in (0, 2, 4):
        reference[i] = nn.Linear(chain[i].in_features, chain[i].out_features)
        reference[i].weight.data = weight_of(chain[i])
        reference[i].bias = chain[i].bias
    x = torch.randn(4, IN, requires_grad=True)
    first, second = chain(x), chain(2 * x)  # two graphs alive at once
    grad = torch.autograd.grad(first.sum() + second.square().sum(), x)[0]
    expected = torch.autograd.grad(reference(x).sum() + reference(2 * x).square().sum(), x)[0]
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(first, reference(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layer = packed()
    x = torch.randn(4, IN, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = quantize(nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN, bias=False)))
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        x = torch.randn(rows, IN, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y, model(x))
        dy = torch.randn_like(y)
        parameters = (x, model[0].bias)
        ours = torch.autograd.grad(y, parameters, dy)
        for ours_, plain in zip(ours, torch.autograd.grad(model(x), parameters, dy), strict=True):
            torch.testing.assert_close(ours_, plain)


def test_the_operators_keep_their_contracts() -> None:
    layer = packed()
    x = torch.randn(2, 3, IN, requires_grad=True)
    arguments = (x, layer.bias, *layer.packed())
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.inlay.linear4.default, arguments, test_utils=checks)
    arguments = (torch.randn(2, 3, OUT), *layer.packed())
    torch.library.opcheck(torch.ops.inlay.linear4_input_grad.default, arguments, test_utils=checks)


@pytest.mark.usefixtures("decoded_first")
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_compute_dtype(compute: str) -> None:
    layer = packed(NF4(compute_dtype=compute))
    dtype = getattr(torch, compute)
    x = torch.randn(3, IN)
    y = layer(x)
    assert y.dtype is torch.float32
    expected = nn.functional.linear(x.to(dtype), weight_of(layer, dtype), layer.bias.to(dtype))
    assert torch.equal(y, expected.float())
    assert layer.bias.dtype is torch.float32  # the peer casts it in place


@pytest.mark.parametrize("compute", [None, "float32"])
def test_autocast(compute: str | None) -> None:
    layer = packed(NF4(compute_dtype=compute))
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
        dtype = torch.bfloat16 if compute is None else torch.float32
        with torch.autocast("cpu", enabled=False):
            expected = nn.functional.linear(x.to(dtype), weight_of(layer, dtype), layer.bias.to(dtype))
        assert torch.equal(y, expected.bfloat16())
        y.sum().backward()  # inside the region, as some loops do
    assert x.grad.dtype is torch.float32


def test_casting_and_moving_keep_bytes_and_scales() -> None:
    for storage in ("uint8", "bfloat16"):
        layer = packed(NF4(storage=storage))
        before = weight_of(layer)
        for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
            change(layer)
            assert torch.equal(weight_of(layer), before)
        layer.half()
        assert layer.bias.dtype is torch.float16
        layer.to("cpu", torch.bfloat16)
        assert torch.equal(weight_of(layer), before)
        meta = copy.deepcopy(layer).to("meta")
        assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_other_storage_holds_the_same_bytes(storage: str) -> None:
    layer = dense()
    plain, viewed = packed(NF4(), copy.deepcopy(layer)), packed(NF4(storage=storage), copy.deepcopy(layer))
    assert viewed.weight.dtype is getattr(torch, storage)
    assert torch.equal(viewed.weight.data.view(torch.uint8).view(-1), plain.weight.data.view(-1))
    x = torch.randn(2, IN)
    assert torch.equal(viewed(x), plain(x))


def test_deepcopy_and_pickle() -> None:
    layer = packed()
    x = torch.randn(2, IN)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(clone) is Linear4
        assert torch.equal(clone(x), layer(x))
        assert clone.weight.data_ptr() != layer.weight.data_ptr()


def test_class_may_be_swapped_for_a_subclass() -> None:
    class Doubled(Linear4):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    layer = packed()
    x = torch.randn(2, IN)
    before, keys = layer(x), list(layer.state_dict())
    layer.__class__ = Doubled
    assert torch.equal(layer(x), before * 2)
    assert list(layer.state_dict()) == keys
    layer.__class__ = Linear4
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_over_what_the_file_says(assign: bool) -> None:
    source = packed(NF4(), dense())
    target = packed(FP4(double_quant=False, block_size=128), dense())
    state = source.state_dict()
    target.load_state_dict(state, assign=assign)
    x = torch.randn(2, IN)
    assert torch.equal(target(x), source(x))
    assert (target.weight.data_ptr() == source.weight.data_ptr()) == assign
    assert str(target) == str(source)


def test_loading_into_bitsandbytes_and_back() -> None:
    layer = dense()
    ours, peer = packed(NF4(), copy.deepcopy(layer)), theirs(layer, "nf4", True)
    other = packed(NF4(), dense())
    other.load_state_dict(peer.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(other(x), ours(x))


def broken_states() -> Iterator[tuple[str, Any, str]]:
    good = packed().state_dict()
    yield "dense", {"weight": torch.zeros(OUT, IN), "bias": good["bias"]}, "dense"
    yield "no scales", {k: v for k, v in good.items() if k != "weight.absmax"}, "absmax"
    yield "no nested", {k: v for k, v in good.items() if k != "weight.nested_absmax"}, "nested_absmax"
    yield "foreign map", {**good, "weight.quant_map": good["weight.quant_map"] + 0.1}, "code book"
    yield "foreign nested map", {**good, "weight.nested_quant_map": good["weight.nested_quant_map"] * 2}, "map"
    yield "no json", {**good, "weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "JSON"
    yield "short", {**good, "weight": good["weight"][:10]}, "bytes"
    yield "no weight", {k: v for k, v in good.items() if k != "weight"}, "weight"
    yield "extra", {**good, "weight.absmax2": good["weight"]}, "absmax2"


@pytest.mark.parametrize(
    ("name", "state", "message"), list(broken_states()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_broken_states_are_refused(name: str, state: dict[str, Tensor], message: str) -> None:
    layer = packed()
    before = weight_of(layer)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(weight_of(layer), before) or name == "extra"


def test_loading_another_shape_is_refused() -> None:
    other = quantize(nn.Sequential(nn.Linear(64, OUT)))[0]
    with pytest.raises(RuntimeError, match="shape"):
        packed().load_state_dict(other.state_dict())


def test_an_empty_layer_says_so() -> None:
    layer = Linear4.prepare(dense(), (OUT, IN), None)
    assert "empty" in str(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    with pytest.raises(QuantizationError, match="never filled"):
        layer(torch.randn(1, IN))


def test_in_place_change_between_forward_and_backward_is_noticed() -> None:
    layer = packed()
    y = layer(torch.randn(2, IN, requires_grad=True))
    layer.weight.data.zero_()  # .data is invisible to autograd; a real in-place write is not
    layer.absmax.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_weight_can_be_read_inside_a_compiled_graph(double_quant: bool) -> None:
    torch._dynamo.reset()
    layer = packed(NF4(double_quant=double_quant))

    def product(x: Tensor) -> Tensor:
        return x @ weight_of(layer, torch.float32).t()

    x = torch.randn(3, IN)
    assert torch.equal(torch.compile(product, fullgraph=True, backend="aot_eager")(x), product(x))
