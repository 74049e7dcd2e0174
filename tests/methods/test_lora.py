"""LoRA against W + s B A in value and gradient, against PEFT, and its settings."""

from __future__ import annotations

import math

import pytest
import torch

import inlay
from inlay.errors import MethodError
from inlay.methods.lora import EmbeddingLoRADelta, LoRADelta, param_groups
from methods.oracle import assert_equals_dense, randomise, without_adapters
from tiny import batch, tiny


def lora(scale):
    return lambda t, W_OI, b_O: (W_OI + scale * t["B"] @ t["A"], b_O)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5", "modernbert"])
@pytest.mark.proves("oracle", "lora")
def test_equals_dense_on_all_linear_layers(family):
    model = tiny(family, "mlm" if family in ("bert", "modernbert") else None)
    adapter = inlay.attach(model, inlay.LoRA(rank=3, alpha=6, sites="linear"))
    randomise(adapter)
    assert_equals_dense(model, adapter, lora(2.0))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "modernbert"])
def test_parts_of_a_fused_projection_have_ranks_of_their_own(family):
    model = tiny(family, "mlm" if family == "modernbert" else None)
    adapter = inlay.attach(model, inlay.LoRA(rank={"attn.q": 2, "attn.v": 5}, alpha=10, sites=("attn.q", "attn.v")))
    shapes = {s.name: (p.A.shape[0], p.B.shape) for s, p in zip(adapter.sites, adapter.pieces.values(), strict=True)}
    assert shapes == {"attn.q": (2, (32, 2)), "attn.v": (5, (32, 5))}
    randomise(adapter)
    assert_equals_dense(
        model, adapter, lambda t, W, b: (W + 10 / t["A"].shape[0] * t["B"] @ t["A"], b)
    )  # fmt: skip


def test_the_untouched_part_of_a_fused_projection_keeps_its_bits():
    model = tiny("gpt2")
    x = torch.randn(2, 5, 32)
    before = model.transformer.h[0].attn.c_attn(x)
    randomise(inlay.attach(model, inlay.LoRA(rank=2, sites=("attn.q", "attn.v"))))
    after = model.transformer.h[0].attn.c_attn(x)
    assert torch.equal(after[..., 32:64], before[..., 32:64])
    assert not torch.isclose(after[..., :32], before[..., :32]).any(-1).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_embedding_and_tied_output_layer(family):
    """Each use of the shared weight has its own delta, and the weight stays shared and frozen."""
    model = tiny(family, "mlm" if family == "bert" else None, tie_word_embeddings=True)
    head = {"bert": "cls.predictions.decoder"}.get(family, "lm_head")
    embedding, output = model.get_input_embeddings(), model.get_submodule(head)
    assert output.weight is embedding.weight
    adapter = inlay.attach(model, inlay.LoRA(rank=3, alpha=3, sites=("embed", head)))
    assert output.weight is embedding.weight
    assert not embedding.weight.requires_grad
    kinds = {type(p) for p in adapter.pieces.values()}
    assert kinds == {LoRADelta, EmbeddingLoRADelta}
    randomise(adapter)

    plain, ids = without_adapters(model), torch.tensor([[7, 8, 9, 7]])
    by_kind = {type(p): p for p in adapter.pieces.values()}
    E, L = by_kind[EmbeddingLoRADelta], by_kind[LoRADelta]
    dense = without_adapters(model)
    dense.get_submodule(head).weight = torch.nn.Parameter(output.weight.detach() + L.B @ L.A)
    dense.get_input_embeddings().weight = torch.nn.Parameter(embedding.weight.detach() + (E.B @ E.A).T)
    wanted = dense(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - plain(input_ids=ids).logits).abs().max() > 0.1


def test_embedding_gradients_equal_dense():
    model = tiny("gpt2")
    adapter = inlay.attach(model, inlay.LoRA(rank=3, alpha=6, sites="embed"))
    randomise(adapter)
    piece = next(iter(adapter.pieces.values()))
    ids = torch.randint(5, 100, (2, 6))
    A, B = (t.detach().clone().requires_grad_() for t in (piece.A, piece.B))
    table = model.get_input_embeddings().weight.detach() + (2.0 * B @ A).T
    wanted = table[ids]
    got = model.get_input_embeddings()(ids)
    torch.testing.assert_close(got, wanted)
    direction = torch.randn_like(wanted)
    (got * direction).sum().backward()
    (wanted * direction).sum().backward()
    torch.testing.assert_close(piece.A.grad, A.grad)
    torch.testing.assert_close(piece.B.grad, B.grad)
    unseen = torch.ones(100, dtype=torch.bool)
    unseen[ids.flatten()] = False
    assert not piece.A.grad[:, unseen].any()


def test_embedding_that_scales_its_rows():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Gemma3TextScaledWordEmbedding(20, 8, padding_idx=0, embed_scale=3.0)

        def forward(self, ids):
            return self.table(ids)

    model, ids = Scaled(), torch.tensor([[3, 4, 5]])
    adapter = inlay.attach(model, inlay.LoRA(rank=2, alpha=2, sites="table"), example={"ids": ids})
    randomise(adapter)
    (piece,) = adapter.pieces.values()
    wanted = 3.0 * (model.table.weight + piece.weight_delta().T)[ids]
    torch.testing.assert_close(model(ids), wanted)


@pytest.mark.parametrize(("settings", "scale"), [
    ({"rank": 4, "alpha": 8}, 2.0),
    ({"rank": 4, "alpha": 8, "rslora": True}, 4.0),
    ({"rank": 8, "alpha": {"ffn": 32, "default": 16}}, {"ffn": 4.0, "attn": 2.0}),
    ({"rank": {"ffn": 2, "ffn.down": 4, "default": 8}, "alpha": 16}, {"ffn.up": 8.0, "ffn.down": 4.0, "attn": 2.0}),
    ({"rank": {"mlp.up_proj": 16, "default": 8}, "alpha": 16}, {"ffn.up": 1.0, "attn": 2.0, "ffn.down": 2.0}),
])  # fmt: skip
def test_scale_of_each_site(settings, scale):
    adapter = inlay.attach(tiny("llama"), inlay.LoRA(**settings))
    wanted = scale if isinstance(scale, dict) else {"": scale}
    for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
        fitting = [k for k in wanted if site.name.startswith(k)]
        if fitting:
            assert piece.scale == wanted[max(fitting, key=len)], site
    assert wanted.keys() <= {k for k in wanted for s in adapter.sites if s.name.startswith(k)}


@pytest.mark.parametrize("settings", [
    {"rank": 0}, {"rank": {"ffn": 0, "default": 4}}, {"rank": {"cross": 4, "default": 4}}, {"alpha": 0.0},
    {"alpha": {"no_such": 1.0}}, {"sites": "norm"}, {"sites": "ffn"}, {"sites": "attn.q:input"},
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_and_leave_no_trace(settings):
    model = tiny("llama")
    keys = list(model.state_dict())
    with pytest.raises(MethodError):
        inlay.attach(model, inlay.LoRA(**settings))
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_layers():
    adapter = inlay.attach(tiny("bart"), inlay.LoRA(rank=2, sites="attn.q", layers=(-1,)))
    assert [s.leave for s in adapter.sites] == [
        "model.encoder.layers.1.self_attn.q_proj", "model.decoder.layers.1.self_attn.q_proj",
    ]  # fmt: skip


def test_dropout_acts_on_the_input_of_A_alone_and_in_training_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    method, example = inlay.LoRA(rank=4, alpha=4, dropout=0.5, sites="0"), {"input": torch.zeros(1, 64)}
    adapter = inlay.attach(model, method, example=example)
    randomise(adapter)
    (piece,) = adapter.pieces.values()
    x = torch.randn(512, 64)
    base = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    full = x @ piece.weight_delta().T
    model.eval()
    torch.testing.assert_close(model(x), base + full)
    model.train()
    # What is left of x is zero or x / (1 - p), row by row; the frozen weight reads all of x.
    one = torch.eye(64)
    delta = model(one) - torch.nn.functional.linear(one, model[0].weight, model[0].bias)
    kept = delta.norm(dim=1) > 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(delta, 2 * kept[:, None] * piece.weight_delta().T, rtol=1e-4, atol=1e-4)
    delta = model(x) - base
    torch.testing.assert_close(torch.stack([model(x) - base for _ in range(400)]).mean(0), full, rtol=0, atol=1.0)
    assert not torch.allclose(delta, full, atol=0.1)


@pytest.mark.parametrize(("init", "bound", "std"), [
    ("kaiming", 1 / math.sqrt(400), 1 / math.sqrt(3 * 400)), ("gaussian", math.inf, 1 / 50),
])  # fmt: skip
def test_initialisation(init, bound, std):
    model = torch.nn.Sequential(torch.nn.Linear(400, 7))
    adapter = inlay.attach(model, inlay.LoRA(rank=50, init=init, sites="0"), example={"input": torch.zeros(1, 400)})
    (piece,) = adapter.pieces.values()
    assert not piece.B.any()
    assert piece.A.abs().max() <= bound
    assert float(piece.A.detach().std()) == pytest.approx(std, rel=0.05)


def test_lora_plus_groups():
    model = tiny("gpt2")
    adapter = inlay.attach(model, inlay.LoRA(rank=2, sites=("attn.q", "embed")) + inlay.BitFit())
    low, high = param_groups(adapter, lr=1e-3, ratio=16)
    assert (low["lr"], high["lr"]) == (1e-3, 1.6e-2)
    names = {id(p): n for n, p in adapter.named_parameters()}
    raised = [names[id(p)] for p in high["params"]]
    assert raised == [f"transformer.h.{i}.attn.c_attn.lora_q.B" for i in (0, 1)]
    assert len(low["params"]) + len(high["params"]) == len(list(adapter.parameters()))
    torch.optim.AdamW(param_groups(adapter, 1e-3))
    other = tiny("gpt2")
    with pytest.raises(MethodError, match=r"LoRA\+"):
        param_groups(inlay.attach(other, inlay.BitFit()), 1e-3)


def test_lower_layers_get_no_backward_when_only_the_last_are_adapted():
    model = tiny("llama")
    inlay.attach(model, inlay.LoRA(rank=2, layers=(-1,)))
    hidden = model(**batch(model), output_hidden_states=True).hidden_states
    assert [h.requires_grad for h in hidden] == [False, False, True]


@pytest.mark.parametrize(("family", "settings", "ours"), [
    ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}, {"sites": ("attn.q", "attn.v", "ffn.down")}),
    ("llama", {"target_modules": ["up_proj"], "use_rslora": True}, {"sites": "ffn.up", "rslora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"sites": "c_attn"}),
    ("gpt2", {"target_modules": ["wte"]}, {"sites": "embed"}),
])  # fmt: skip
def test_equals_peft(family, settings, ours):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny(family), peft.LoraConfig(r=3, lora_alpha=12, **settings)).eval()
    model = tiny(family)
    adapter = inlay.attach(model, inlay.LoRA(rank=3, alpha=12, **ours))
    randomise(adapter)
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A") and not n.endswith("base_layer")}
    assert len(layers) == len(adapter.pieces)
    with torch.no_grad():
        for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
            layer = layers["base_model.model." + site.leave]
            if site.kind == "embedding":
                layer.lora_embedding_A["default"].copy_(piece.A)
                layer.lora_embedding_B["default"].copy_(piece.B)
            else:
                layer.lora_A["default"].weight.copy_(piece.A)
                layer.lora_B["default"].weight.copy_(piece.B)
    inputs = batch(model, labels=False)
    with torch.no_grad():
        wanted = theirs(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - without_adapters(model)(**inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_fp32_masters_and_compute_in_the_dtype_of_the_activations(dtype):
    model = tiny("llama", dtype=dtype)
    adapter = inlay.attach(model, inlay.LoRA(rank=2, sites=("linear", "embed")))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    loss = model(**batch(model)).loss
    loss.backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    assert model(**batch(model, labels=False)).logits.dtype == dtype
