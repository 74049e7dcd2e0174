"""DoRA against m (W + s B A) / ‖W + s B A‖ written out, its cached closed-form norm, and PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import inlay
from inlay.errors import AdapterError
from inlay.methods.base import Frozen
from inlay.quant.bridge import weight_of
from inlay.quant.model import quantize
from methods.oracle import assert_equals_dense, randomise, without_adapters
from tiny import batch, tiny


def dora(scale):
    def formula(t, W_OI, b_O):
        V_OI = W_OI + scale * t["B"] @ t["A"]
        n_O = V_OI.norm(dim=1).detach()
        return (t["m"] / n_O)[:, None] * V_OI, b_O

    return formula


def pieces_of(adapter):
    return list(adapter.pieces.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert", "t5", "gpt_neox"])
@pytest.mark.proves("oracle", "dora")
def test_equals_dense_on_all_linear_layers(family):
    model = tiny(family, "mlm" if family == "bert" else None)
    adapter = inlay.attach(model, inlay.DoRA(rank=3, alpha=6))
    randomise(adapter)
    assert_equals_dense(model, adapter, dora(2.0))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_equals_dense_on_parts_of_a_fused_projection(family):
    model = tiny(family)
    adapter = inlay.attach(model, inlay.DoRA(rank=3, alpha=6, sites=("attn.q", "attn.v")))
    randomise(adapter)
    assert_equals_dense(model, adapter, dora(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_output_is_unchanged_at_the_start_bit_for_bit(family, dtype):
    model = tiny(family, dtype=dtype)
    inputs = batch(model, labels=False)
    with torch.no_grad():
        before = model(**inputs).logits
        inlay.attach(model, inlay.DoRA(rank=3, sites=("linear", "embed")), head=None)
        assert torch.equal(model(**inputs).logits, before)


def test_count_is_that_of_lora_and_one_magnitude_for_each_output():
    counts = [inlay.attach(tiny("llama"), m(rank=4)).trained_parameters for m in (inlay.LoRA, inlay.DoRA)]
    outputs = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert counts[1] == counts[0] + outputs


@given(
    out=st.integers(1, 40),
    inn=st.integers(1, 40),
    rank=st.integers(1, 6),
    scale=st.floats(0.01, 8.0),
    bias=st.booleans(),
)
def test_closed_form_of_the_norm(out, inn, rank, scale, bias):
    torch.manual_seed(out * 41 + inn)
    model = torch.nn.Sequential(torch.nn.Linear(inn, out, bias=bias))
    method = inlay.DoRA(rank=rank, alpha=scale * rank, sites="0")
    adapter = inlay.attach(model, method, example={"input": torch.zeros(1, inn)})
    (piece,) = pieces_of(adapter)
    torch.testing.assert_close(piece.norm(), model[0].weight.norm(dim=1))
    randomise(adapter)
    wanted = (model[0].weight + scale * piece.B @ piece.A).norm(dim=1)
    # Where W + s B A nearly cancels, so do the terms of the closed form, and its last digits are gone.
    assume(bool((wanted > 0.1 * model[0].weight.norm(dim=1)).all()))
    torch.testing.assert_close(piece.norm(), wanted.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        piece.weight_delta() + model[0].weight,
        (piece.m / wanted)[:, None] * (model[0].weight + scale * piece.B @ piece.A),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_rows_of_zeros_give_no_nan():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    torch.nn.init.zeros_(model[0].weight[1:2])
    adapter = inlay.attach(model, inlay.DoRA(rank=2, sites="0"), example={"input": torch.zeros(1, 6)})
    x = torch.randn(3, 6)
    assert torch.equal(model(x), x @ model[0].weight.T)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_large_weights_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr("inlay.methods.dora.CHUNK", 96)
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.DoRA(rank=3, alpha=6))
    randomise(adapter)
    assert_equals_dense(model, adapter, dora(2.0))


class Reads:
    """Counts how often a frozen weight is read."""

    def __init__(self, monkeypatch):
        self.count = 0
        read = Frozen.weight

        def counted(frozen):
            self.count += 1
            return read(frozen)

        monkeypatch.setattr(Frozen, "weight", counted)

    def since(self):
        count, self.count = self.count, 0
        return count


@pytest.fixture
def small(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    adapter = inlay.attach(model, inlay.DoRA(rank=2, sites="0"), example={"input": torch.zeros(1, 6)})
    return model, adapter, pieces_of(adapter)[0], Reads(monkeypatch)


def test_the_norm_is_computed_once_between_changes(small):
    model, adapter, piece, reads = small
    x = torch.randn(3, 6)
    for _ in range(3):
        model(x).sum().backward()
    with torch.inference_mode():
        model(x)
    assert reads.since() == 1
    changes = {
        "step": lambda: torch.optim.SGD(adapter.parameters(), lr=0.1).step(),
        "copy": lambda: piece.A.add_(0.1),
        "load": lambda: adapter.load_state_dict({k: v + 0.1 for k, v in adapter.state_dict().items()}),
        "data": lambda: setattr(piece.B, "data", piece.B.data + 0.1),
        "base": lambda: model[0].weight.mul_(2.0),
        "cast": lambda: model.double(),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        wanted = (model[0].weight.float() + piece.scale * piece.B.float() @ piece.A.float()).norm(dim=1)
        reads.since()
        torch.testing.assert_close(piece.norm(), wanted.detach(), msg=name)
        assert reads.since() == 1, name


def test_an_optimizer_that_writes_behind_autograd_is_seen(small):
    """Some optimizers write through `.data`, which version counters do not see."""
    _, adapter, piece, _ = small

    class Data(torch.optim.Optimizer):
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.data.add_(1.0)

    piece.norm()
    optimizer = Data(adapter.parameters(), {})
    optimizer.step()
    wanted = piece.frozen.weight() + piece.scale * piece.B @ piece.A
    torch.testing.assert_close(piece.norm(), wanted.norm(dim=1).detach())


def test_a_norm_made_in_inference_mode_serves_training(small):
    model, adapter, _, _ = small
    with torch.inference_mode():
        model(torch.randn(3, 6))
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_autocast_does_not_round_the_norm():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.DoRA(rank=3, alpha=6))
    randomise(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch(model, labels=False))
    for piece in pieces_of(adapter):
        wanted = piece.frozen.weight() + piece.scale * piece.B @ piece.A
        torch.testing.assert_close(piece.norm(), wanted.norm(dim=1).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_reads_its_own_weights(clone):
    model = tiny("gpt2")
    randomise(inlay.attach(model, inlay.DoRA(rank=3, sites="attn.q")))
    twin = clone(model)
    (adapter,) = inlay.adapters(twin).values()
    for piece, site in zip(pieces_of(adapter), adapter.sites, strict=True):
        assert piece.frozen._module is twin.get_submodule(site.leave)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_on_rows_with_another_adapter_the_deltas_add_up():
    model = tiny("qwen2")
    randomise(inlay.attach(model, inlay.LoRA(rank=3, sites="attn.q"), name="lora"))
    randomise(inlay.attach(model, inlay.DoRA(rank=3, sites="attn.q"), name="dora"), seed=8)
    q, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 4, 32)
    y = {}
    for names in ((), ("lora",), ("dora",), ("lora", "dora"), ("dora", "lora")):
        inlay.use(model, names or None)
        y[names] = q(x)
    wanted = y["lora",] + y["dora",] - y[()]
    torch.testing.assert_close(y["lora", "dora"], wanted)
    torch.testing.assert_close(y["dora", "lora"], wanted)
    inlay.use(model, [("lora", "dora"), "dora"])
    mixed = q(x)
    torch.testing.assert_close(mixed[0], wanted[0])
    torch.testing.assert_close(mixed[1], y["dora",][1])


def test_a_replaced_module_cannot_be_rescaled_too():
    model = tiny("llama")
    inlay.attach(model, inlay.Full(sites=["q_proj"]), name="full")
    inlay.attach(model, inlay.DoRA(sites="attn.q"), name="dora")
    with pytest.raises(AdapterError, match="contradicts"):
        inlay.use(model, ("full", "dora"))


def test_on_a_quantised_base():
    """The same as on the dense base that the quantised weights stand for."""
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    dense = copy.deepcopy(model)
    quantize(model)
    with torch.no_grad():
        for path, module in dense.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                module.weight.copy_(weight_of(model.get_submodule(path)))
    logits = []
    for base in (model, dense):
        torch.manual_seed(0)
        adapter = inlay.attach(base, inlay.DoRA(rank=3, alpha=6))
        randomise(adapter)
        logits.append(base(**batch(base, labels=False)).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "settings", "sites"), [
    ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}, ("attn.q", "attn.v", "ffn.down")),
    ("qwen2", {"target_modules": ["k_proj"]}, "attn.k"),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "c_attn"),
    ("gpt2", {"target_modules": ["wte"]}, "embed"),
])  # fmt: skip
def test_equals_peft(family, settings, sites):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, **settings)).eval()
    model = tiny(family)
    adapter = inlay.attach(model, inlay.DoRA(rank=3, alpha=6, sites=sites))
    randomise(adapter)
    with torch.no_grad():
        for site, piece in zip(adapter.sites, pieces_of(adapter), strict=True):
            layer = theirs.get_submodule("base_model.model." + site.leave)
            if site.kind == "embedding":
                layer.lora_embedding_A["default"].copy_(piece.A)
                layer.lora_embedding_B["default"].copy_(piece.B)
            else:
                layer.lora_A["default"].weight.copy_(piece.A)
                layer.lora_B["default"].weight.copy_(piece.B)
            layer.lora_magnitude_vector["default"].weight.copy_(piece.m)
        inputs = batch(model, labels=False)
        wanted = theirs(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - without_adapters(model)(**inputs).logits).abs().max() > 1e-2
