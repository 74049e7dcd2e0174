"""Diff pruning: gates and penalty against autograd, W + z dW written out, the fixed mask, sparse storage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay.errors import MethodError
from inlay.methods.diff_pruning import GatedDiff, density, param_groups, prune
from methods.oracle import assert_equals_dense, randomise, without_adapters
from tiny import batch, tiny


def z(a):
    return (torch.sigmoid(a) * 3 - 1.5).clamp(0, 1)


def dense(structured):
    def formula(t, W_OI, b_O):
        def diff(name):
            d = t[f"{name}.value"] * z(t[f"{name}.gate"])
            return d * z(t[f"{name}.group"]) if structured else d

        return W_OI + diff("W"), None if b_O is None else b_O + diff("b")

    return formula


def attached(family="qwen2", **settings):
    model = tiny(family, "mlm" if family == "bert" else None)
    settings = {"sites": ("attn.q", "ffn.down"), "gate_init": 0.8} | settings
    adapter = inlay.attach(model, inlay.DiffPruning(**settings))
    return model, adapter


def pieces_of(adapter):
    return list(adapter.pieces.values())


def train(model, adapter, steps, lr=0.01):
    optimizer = torch.optim.AdamW(param_groups(adapter, lr))
    model.train()
    for i in range(steps):
        model(**batch(model, seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.proves("oracle", "diffpruning")
def test_equals_dense(family, structured):
    model, adapter = attached(family, structured=structured, sites="linear")
    randomise(adapter)
    assert_equals_dense(model, adapter, dense(structured))


def test_parts_of_a_fused_projection_and_embeddings():
    model, adapter = attached("gpt2", sites=("attn.v", "embed"))
    randomise(adapter)
    plain = without_adapters(model)
    with torch.no_grad():
        for site, piece in zip(adapter.sites, pieces_of(adapter), strict=True):
            module = plain.get_submodule(site.leave)
            lo, hi = site.columns[0] if site.columns else (0, module.weight.shape[1])
            module.weight[:, lo:hi] += piece.weight_delta().T
            if site.has_bias:
                module.bias[lo:hi] += piece.bias_delta()
        tied = plain.lm_head.weight is plain.transformer.wte.weight
        assert tied
        plain.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())
        inputs = batch(model, labels=False)
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_output_is_unchanged_at_the_start_bit_for_bit():
    for family in ("qwen2", "gpt2", "bert"):
        model, adapter = attached(family, sites="linear")
        inputs = batch(model, labels=False)
        base = without_adapters(model)(**inputs).logits
        for mode in (model.eval(), model.train()):
            assert torch.equal(mode(**inputs).logits, base)
        assert adapter.trained_parameters > 0


def test_count():
    model = tiny("llama")
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert inlay.attach(model, inlay.DiffPruning(structured=False)).trained_parameters == 2 * weights
    model.get_submodule("model").requires_grad_(True)
    assert inlay.attach(tiny("llama"), inlay.DiffPruning()).trained_parameters == 2 * weights + 2 * 7


@given(st.floats(-4, 4), st.booleans())
def test_gates_follow_the_hard_concrete_distribution(a, structured):
    """Closed form: P(z = 0) = σ(log(-low / high) - a) for one gate; the mean without noise is the stretched σ(a)."""
    diff = GatedDiff((20_000,), inlay.DiffPruning(gate_init=a, structured=structured, low=-0.5, high=1.2))
    diff.value.data.fill_(1.0)
    shut = float((diff() == 0).float().mean())
    one = 1 / (1 + math.exp(a - math.log(0.5 / 1.2)))
    if not structured:
        assert shut == pytest.approx(one, abs=0.02)
    else:
        assert shut == pytest.approx(one, abs=0.02) or shut == 1.0
    wanted = min(1.0, max(0.0, 1.7 / (1 + math.exp(-a)) - 0.5))
    diff.eval()
    torch.testing.assert_close(diff(), torch.full((20_000,), wanted ** (1 + structured)), rtol=1e-4, atol=1e-6)


def test_gradient_through_the_gates():
    """dL/dd = g z and dL/da = g d (high - low) σ'(.) where 0 < z < 1, with the same noise."""
    diff = GatedDiff((500,), inlay.DiffPruning(gate_init=0.5, structured=False))
    with torch.no_grad():
        diff.value.normal_()
    torch.manual_seed(3)
    found = diff()
    torch.manual_seed(3)
    u = torch.rand(500).clamp(1e-4, 1 - 1e-4)
    s = torch.sigmoid(u.log() - (1 - u).log() + 0.5)
    gates = (s * 3 - 1.5).clamp(0, 1)
    torch.testing.assert_close(found, diff.value * gates)
    g = torch.randn(500)
    (found * g).sum().backward()
    inside = (gates > 0) & (gates < 1)
    assert 0 < int(inside.sum()) < 500
    torch.testing.assert_close(diff.value.grad, g * gates)
    torch.testing.assert_close(diff.gate.grad, torch.where(inside, g * diff.value.detach() * 3 * s * (1 - s), 0.0))


@pytest.mark.parametrize("structured", [True, False])
def test_penalty_is_added_before_each_step(structured):
    """With dW = 0 the loss has no gradient for the gates, so what a step does to them is the penalty's alone."""
    model, adapter = attached(structured=structured, penalty=0.5, low=-0.4, high=1.3)
    randomise(adapter, 0.3)
    for piece in pieces_of(adapter):
        for diff in piece.diffs().values():
            diff.value.data.zero_()
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    model(**batch(model)).loss.backward()
    optimizer.step()
    for name, parameter in adapter.named_parameters():
        if name.endswith(("gate", "group")):
            a = before[name].requires_grad_()
            (0.5 * torch.sigmoid(a - math.log(0.4 / 1.3)).sum()).backward()
            torch.testing.assert_close(parameter.detach(), a.detach() - a.grad, rtol=1e-4, atol=1e-6)


def test_a_strong_penalty_shuts_gates_and_a_group():
    model, adapter = attached(penalty=0.1, gate_init=0.5)
    assert density(adapter) == 1.0
    train(model, adapter, 20)
    assert density(adapter) < 0.5


def test_gates_may_have_an_optimizer_of_their_own():
    """As in the authors' code; the penalty goes with the gates."""
    model, adapter = attached(penalty=1.0)
    gates = [p for n, p in adapter.named_parameters() if n.endswith(("gate", "group"))]
    values = [p for n, p in adapter.named_parameters() if n.endswith("value")]
    model(**batch(model)).loss.backward()
    before = [g.detach().clone() for g in gates]
    torch.optim.SGD(values, lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, gates, strict=True))
    torch.optim.SGD(gates, lr=0.1).step()
    assert all((b < a).all() for a, b in zip(before, gates, strict=True))


def test_groups_for_the_optimizer():
    _, adapter = attached()
    values, gates = sorted(param_groups(adapter, 1e-4), key=lambda g: g["lr"])
    assert (values["lr"], gates["lr"], gates["weight_decay"]) == (1e-4, 0.1, 0.0)
    assert "weight_decay" not in values
    names = {id(p): n.rpartition(".")[2] for n, p in adapter.named_parameters()}
    assert {names[id(p)] for p in values["params"]} == {"value"}
    assert {names[id(p)] for p in gates["params"]} == {"gate", "group"}


@pytest.mark.parametrize("fraction", [0.0, 0.005, 0.3, 1.0])
def test_prune_keeps_the_largest_entries_over_all_sites(fraction):
    model, adapter = attached()
    randomise(adapter, 0.3)
    for scale, piece in enumerate(pieces_of(adapter), 1):
        piece.W.value.data.mul_(scale)
    before = torch.cat([d.mean().flatten() for p in pieces_of(adapter) for d in p.diffs().values()]).detach()
    total = before.numel()
    kept = prune(adapter, fraction)
    after = torch.cat([d.mean().flatten() for p in pieces_of(adapter) for d in p.diffs().values()]).detach()
    wanted = min(math.floor(fraction * total), int((before != 0).sum()))
    assert kept == int((after != 0).sum()) == wanted
    bound = before.abs().sort(descending=True).values[wanted - 1] if wanted else torch.inf
    torch.testing.assert_close(after, torch.where(before.abs() >= bound, before, 0.0))
    assert density(adapter) == pytest.approx(wanted / total)
    logits = model(**batch(model, labels=False)).logits
    assert torch.isfinite(logits).all()


def test_training_goes_on_with_the_fixed_mask():
    model, adapter = attached()
    train(model, adapter, 3)
    kept = prune(adapter, 0.1)
    masks = [d.gate > 0 for p in pieces_of(adapter) for d in p.diffs().values()]
    before = [p.weight_delta().clone() for p in pieces_of(adapter)]
    model.train()
    assert torch.equal(model(**batch(model)).logits, model.eval()(**batch(model)).logits), "no noise is left"
    train(model, adapter, 3)
    after = [d.mean() for p in pieces_of(adapter) for d in p.diffs().values()]
    assert all(not a[~m].any() for a, m in zip(after, masks, strict=True))
    assert any(not torch.equal(a, p.weight_delta()) for a, p in zip(before, pieces_of(adapter), strict=True))
    assert all(torch.isfinite(p).all() for n, p in adapter.named_parameters() if n.endswith("value"))
    assert sum(int(m.sum()) for m in masks) == kept


@pytest.mark.parametrize("fraction", [None, 0.0, 0.02])
def test_folder_gives_the_same_bits_and_is_sparse_when_pruned(tmp_path, fraction):
    model, adapter = attached(structured=fraction != 0.0)
    train(model, adapter, 3)
    kept = None if fraction is None else prune(adapter, fraction)
    inputs = batch(model, labels=False)
    with torch.no_grad():
        before = model(**inputs).logits
        adapter.save(tmp_path / "a")
        found = inlay.load(without_adapters(model), tmp_path / "a")
        assert torch.equal(found.model(**inputs).logits, before)
    diffs = [d for p in pieces_of(found) for d in p.diffs().values()]
    groups = sum(d.group is not None for d in diffs)
    total = sum(d.value.numel() for d in diffs)
    assert adapter.stored_parameters == groups + (2 * total if kept is None else 2 * kept)
    assert all(d.fixed == (kept is not None) for d in diffs)
    train(found.model, found, 2)
    if kept is not None:
        assert sum(int((d.mean() != 0).sum()) for d in diffs) == kept


def test_resuming_gives_the_bits_of_an_uninterrupted_run():
    runs = []
    for cut in (6, 2):
        model, adapter = attached(penalty=1e-3)
        optimizer = torch.optim.AdamW(param_groups(adapter, 0.01))
        for i in range(6):
            if i == cut:
                state, moments = {k: v.clone() for k, v in adapter.state_dict().items()}, optimizer.state_dict()
                model, adapter = attached(penalty=1e-3)
                optimizer = torch.optim.AdamW(param_groups(adapter, 0.01))
                adapter.load_state_dict(state)
                optimizer.load_state_dict(moments)
            torch.manual_seed(i)
            model.train()
            model(**batch(model, seed=i)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(adapter.state_dict())
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_what_does_not_fit_is_refused():
    _, adapter = attached()
    with pytest.raises(MethodError, match="between 0 and 1"):
        prune(adapter, 1.5)
    with pytest.raises(MethodError, match="no DiffPruning part"):
        prune(inlay.attach(tiny("llama"), inlay.LoRA()))
    with pytest.raises(MethodError, match="projections and embeddings"):
        inlay.attach(tiny("llama"), inlay.DiffPruning(sites="norm"))
    diff = GatedDiff((4, 3), inlay.DiffPruning())
    good = diff.stored()
    for change in (
        {"indices": torch.tensor([12]), "values": torch.ones(1), "gates": torch.empty(0)},
        {"indices": torch.tensor([1, 2]), "values": torch.ones(1), "gates": torch.empty(0)},
        {"values": torch.ones(5), "gates": torch.ones(5)},
    ):
        with pytest.raises(MethodError, match="does not fit"):
            diff.load_stored(good | change)
    for settings in ({"low": 0.1}, {"high": 0.9}, {"penalty": -1.0}, {"gate_init": math.inf}):
        with pytest.raises(ValueError):  # noqa: PT011
            inlay.DiffPruning(**settings)


def test_the_difference_is_computed_once_between_changes(monkeypatch):
    model, adapter = attached()
    randomise(adapter)
    calls = []
    monkeypatch.setattr(GatedDiff, "mean", lambda self, mean=GatedDiff.mean: calls.append(1) or mean(self))
    inputs = batch(model, labels=False)
    with torch.no_grad():
        first = model(**inputs).logits
        count = len(calls)
        assert torch.equal(model(**inputs).logits, first)
        assert len(calls) == count
        pieces_of(adapter)[0].W.value.mul_(2.0)
        assert not torch.equal(model(**inputs).logits, first)
        assert len(calls) == count + 1
