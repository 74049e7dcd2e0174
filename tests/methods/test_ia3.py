"""IA3 against rescaled rows and columns, against PEFT, and the paper's places."""

from __future__ import annotations

import pytest
import torch
import transformers

import inlay
from inlay.errors import MergeError, MethodError, SiteError
from methods.oracle import randomise, run, without_adapters
from tiny import batch, tiny

PLACES = {
    "llama": {"k_proj": "attn.k", "v_proj": "attn.v", "down_proj": "ffn.down"},
    "gpt2": {"c_attn": "attn.k", "mlp.c_proj": "ffn.down"},
    "bert": {"self.key": "attn.k", "self.value": "attn.v", "output.dense": "ffn.down"},
    "opt": {"k_proj": "attn.k", "v_proj": "attn.v", "fc2": "ffn.down"},
}


def scaled(plain, adapter):
    """Writes l into the rows or columns of a copy's weights, and into its biases."""
    with torch.no_grad():
        for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
            module = plain.get_submodule(site.leave)
            conv = type(module).__name__ == "Conv1D"
            weight_OI = module.weight.T if conv else module.weight
            if site.tap == "input":
                weight_OI.mul_(piece.l)
                continue
            lo, hi = site.columns[0] if site.columns else (0, weight_OI.shape[0])
            weight_OI[lo:hi].mul_(piece.l[:, None])
            if module.bias is not None:
                module.bias[lo:hi].mul_(piece.l)
    return plain


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "opt", "t5", "bart"])
@pytest.mark.proves("oracle", "ia3")
def test_equals_rescaled_weights(family):
    model = tiny(family, "mlm" if family == "bert" else None)
    adapter = inlay.attach(model, inlay.IA3())
    randomise(adapter, 0.5)
    wanted, x_wanted = run(scaled(without_adapters(model), adapter))
    got, x_got = run(model)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - run(without_adapters(model))[0]).abs().max() > 1e-2
    direction = torch.randn_like(wanted)
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    torch.testing.assert_close(x_got.grad, x_wanted.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tap", ["attn.v", "ffn.down:input"])
@pytest.mark.proves("oracle", "ia3")
def test_gradient_of_l(tap):
    """∂L/∂l_i = Σ over tokens of y_i ∂L/∂(l y)_i, by central differences in fp64."""
    model = tiny("gpt2", dtype=torch.float64)
    adapter = inlay.attach(model, inlay.IA3(sites=tap))
    randomise(adapter, 0.3)
    for p in adapter.parameters():
        p.data = p.data.double()
    inputs = batch(model, labels=False)
    direction = torch.randn(3, 9, 100, dtype=torch.float64)
    (model(**inputs).logits * direction).sum().backward()
    piece = next(iter(adapter.pieces.values()))
    with torch.no_grad():
        for i in (0, 7):
            losses = []
            for step in (1e-5, -2e-5):
                piece.l[i] += step
                losses.append((model(**inputs).logits * direction).sum())
            piece.l[i] += 1e-5
            torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, piece.l.grad[i], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "modernbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_unchanged_at_the_start_bit_for_bit(family, dtype):
    model = tiny(family, dtype=dtype)
    inputs = batch(model, labels=False)
    with torch.no_grad():
        before = model(**inputs).logits
        inlay.attach(model, inlay.IA3(), head=None)
        assert torch.equal(model(**inputs).logits, before)


def test_places_and_counts():
    """L (2 d_kv + d_ff) in an encoder or decoder, L (4 d_kv + d_ff) where there is cross-attention."""
    assert inlay.attach(tiny("llama"), inlay.IA3()).trained_parameters == 2 * (2 * 16 + 48)
    assert inlay.attach(tiny("gpt2"), inlay.IA3()).trained_parameters == 2 * (2 * 32 + 48)
    assert inlay.attach(tiny("modernbert"), inlay.IA3(), head=None).trained_parameters == 2 * (2 * 32 + 48)
    assert inlay.attach(tiny("t5"), inlay.IA3()).trained_parameters == 2 * (2 * 64 + 48) + 2 * (4 * 64 + 48)


@pytest.mark.parametrize(("name", "d_kv", "heads", "d_ff", "published"), [
    ("T0-3B", 64, 32, 5120, 540_672), ("T0-11B", 64, 64, 10240, 1_081_344),
])  # fmt: skip
@pytest.mark.proves("count", "ia3")
def test_published_counts(name, d_kv, heads, d_ff, published):
    config = transformers.T5Config(
        d_model=d_kv * heads, d_kv=d_kv, d_ff=d_ff, num_layers=24, num_heads=heads, vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    adapter = inlay.attach(model, inlay.IA3())
    assert adapter.trained_parameters == adapter.stored_parameters == published


def test_small_changes_survive_bf16():
    """l = 1.001 is 1 in bf16; as l - 1 it still rescales."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16()
    adapter = inlay.attach(model, inlay.IA3(sites="0"), example={"input": torch.zeros(1, 8, dtype=torch.bfloat16)})
    (piece,) = adapter.pieces.values()
    y = torch.full((1, 8), 100.0, dtype=torch.bfloat16)
    with torch.no_grad():
        piece.l.fill_(1.001)
    torch.testing.assert_close(piece(y, y).float(), torch.full((1, 8), 0.1), rtol=0.01, atol=0)


def test_folds_rows_columns_and_bias_exactly():
    model = tiny("gpt2")
    adapter = inlay.attach(model, inlay.IA3(sites=("ffn.up", "ffn.down:input")))
    randomise(adapter)
    up, down = list(adapter.pieces.values())[:2]
    W, b = torch.randn(48, 32), torch.randn(48)
    weight, bias = up.fold(W, b)
    assert torch.equal(weight, W * up.l[:, None])
    assert torch.equal(bias, b * up.l)
    V, c = torch.randn(32, 48), torch.randn(32)
    weight, bias = down.fold_input(V, c)
    assert torch.equal(weight, V * down.l)
    assert bias is c
    with pytest.raises(MergeError):
        up.weight_delta()


def test_refusals():
    with pytest.raises(MethodError, match="rescales"):
        inlay.attach(tiny("bert"), inlay.IA3(sites="ffn.norm"))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(SiteError, match="Name modules"):
        inlay.attach(plain, inlay.IA3(), example={"input": torch.zeros(1, 4)})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_equals_peft(family):
    peft = pytest.importorskip("peft")
    names = list(PLACES[family])
    config = peft.IA3Config(
        target_modules=names, feedforward_modules=[n for n in names if PLACES[family][n] == "ffn.down"],
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny(family), config).eval()
    model = tiny(family)
    sites = ("c_attn", "ffn.down:input") if family == "gpt2" else None
    adapter = inlay.attach(model, inlay.IA3(sites=sites))
    randomise(adapter, 0.5)
    with torch.no_grad():
        for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
            vector = theirs.get_submodule("base_model.model." + site.leave).ia3_l["default"]
            vector.copy_(piece.l.view_as(vector))
        inputs = batch(model, labels=False)
        wanted = theirs(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - without_adapters(model)(**inputs).logits).abs().max() > 1e-2
