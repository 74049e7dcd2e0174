"""BitFit against trained biases, its counts, and the report of how far each bias moved."""

from __future__ import annotations

import math

import pytest
import torch

import inlay
from inlay.errors import MethodError
from inlay.methods.bitfit import change_report
from methods.oracle import randomise, run, without_adapters
from tiny import batch, tiny


def moved(plain, adapter):
    """Adds b to the biases of a copy; returns the biases as leaves."""
    biases = {}
    for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
        module = plain.get_submodule(site.leave)
        lo, hi = site.columns[0] if site.columns else (0, module.bias.shape[0])
        with torch.no_grad():
            module.bias[lo:hi] += piece.b
        biases[id(piece)] = module.bias, slice(lo, hi)
    return biases


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "qwen2", "bart"])
@pytest.mark.proves("oracle", "bitfit")
def test_equals_training_the_biases_themselves(family):
    model = tiny(family, "mlm" if family == "bert" else None)
    adapter = inlay.attach(model, inlay.BitFit())
    randomise(adapter)
    plain = without_adapters(model)
    biases = moved(plain, adapter)
    wanted, x_wanted = run(plain)
    got, x_got = run(model)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - run(without_adapters(model))[0]).abs().max() > 1e-2
    direction = torch.randn_like(wanted)
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    torch.testing.assert_close(x_got.grad, x_wanted.grad, rtol=1e-3, atol=1e-4)
    for piece in adapter.pieces.values():
        bias, own = biases[id(piece)]
        if bias.grad is not None:
            torch.testing.assert_close(piece.b.grad, bias.grad[own], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "qwen2", "bart", "roberta", "gpt_neox"])
def test_takes_every_bias_of_the_base_and_no_other_parameter(family):
    model = tiny(family, "mlm" if family in ("bert", "roberta") else None)
    wanted = sum(p.numel() for n, p in model.base_model.named_parameters() if n.rpartition(".")[2] == "bias")
    adapter = inlay.attach(model, inlay.BitFit())
    assert adapter.trained_parameters == wanted
    assert all(p.ndim == 1 for p in adapter.parameters())


def test_query_and_intermediate_subset():
    adapter = inlay.attach(tiny("bert", "mlm"), inlay.BitFit(sites=("attn.q", "ffn.up")))
    assert adapter.trained_parameters == 2 * (32 + 48)


@pytest.mark.parametrize("family", ["llama", "t5", "mistral", "qwen3"])
def test_a_model_without_biases_is_refused_by_name(family):
    model = tiny(family)
    with pytest.raises(MethodError, match="has none"):
        inlay.attach(model, inlay.BitFit())
    assert all(p.requires_grad for p in model.parameters())


def test_missing_biases_can_be_added():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.BitFit(add_missing=True))
    assert adapter.trained_parameters == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    randomise(adapter)
    q = model.model.layers[0].self_attn.q_proj
    piece = adapter.pieces["model.layers.0.self_attn.q_proj.bitfit"]
    x = torch.randn(3, 32)
    torch.testing.assert_close(q(x), x @ q.weight.T + piece.b)


def test_fold_adds_to_the_bias_and_leaves_the_weight():
    adapter = inlay.attach(tiny("bert", "mlm"), inlay.BitFit(sites="attn.q"))
    randomise(adapter)
    piece = next(iter(adapter.pieces.values()))
    W, b = torch.randn(32, 32), torch.randn(32)
    weight, bias = piece.fold(W, b)
    assert torch.equal(weight, W)
    assert torch.equal(bias, b + piece.b)
    assert torch.equal(piece.fold(W, None)[1], piece.b)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])
def test_change_report_is_the_mean_of_each_term(family):
    """Fused projections are reported by their parts; gpt_neox lays q, k, v out head by head."""
    model = tiny(family, "mlm" if family == "bert" else None)
    adapter = inlay.attach(model, inlay.BitFit())
    key = {"bert": "attention.self.key", "gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}[family]
    index = {
        "bert": torch.arange(32), "gpt2": torch.arange(32, 64),
        "gpt_neox": torch.cat([torch.arange(24 * h + 8, 24 * h + 16) for h in range(4)]),
    }[family]  # fmt: skip
    randomise(adapter)
    pieces = {s.leave: p for s, p in zip(adapter.sites, adapter.pieces.values(), strict=True)}
    report = change_report(adapter)
    roles = {"attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down", "attn.norm", "ffn.norm"}
    assert roles <= set(report.columns)
    assert report.rows[:2] == ["0", "1"]
    for layer in (0, 1):
        (path,) = [p for p in pieces if p.endswith(f"{layer}.{key}")]
        found = report.values[layer][report.columns.index("attn.k")]
        assert found == pytest.approx(float(pieces[path].b.detach()[index].abs().mean()))
    (other,) = [r for r in report.rows if r == "other"]
    assert math.isnan(report.values[report.rows.index(other)][report.columns.index("attn.k")])


def test_change_report_ranks_the_terms_and_draws_them(tmp_path):
    adapter = inlay.attach(tiny("bert", "mlm"), inlay.BitFit())
    with torch.no_grad():
        for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
            piece.b.fill_(-3.0 if site.leave.endswith("query") else 2.0 if "intermediate" in site.leave else 0.1)
    report = change_report(adapter)
    assert list(report.terms)[:2] == ["attn.q", "ffn.up"]
    assert report.terms["attn.q"] == pytest.approx(3.0)
    text = str(report)
    assert "moved most: attn.q 3.00e+00, ffn.up 2.00e+00" in text
    report.picture(str(tmp_path / "biases.png"))
    assert (tmp_path / "biases.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MethodError, match="no BitFit"):
        change_report(inlay.attach(tiny("llama"), inlay.LoRA()))


def test_training_moves_biases_and_nothing_else():
    model = tiny("bert")
    base = {n: p.clone() for n, p in model.named_parameters()}
    adapter = inlay.attach(model, inlay.BitFit())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**batch(model)).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, base[n]) for n, p in without_adapters(model).named_parameters())
    assert max(change_report(adapter).terms.values()) > 0
