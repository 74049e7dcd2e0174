"""AdaLoRA: P Λ Q written out, the published budget, scores and penalty, PEFT's masks, and every kind of loop."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay import stepping
from inlay.errors import MethodError
from inlay.heatmap import by_layer
from inlay.methods.adalora import budget_of, rank_map, ranks, set_total_steps
from inlay.methods.budget import allocation, phases
from methods.oracle import assert_equals_dense, randomise, without_adapters
from tiny import batch, tiny

SMALL = {"target_rank": 1, "init_rank": 3, "total_steps": 12, "warmup": 2, "final": 4, "interval": 2}


def attached(model=None, **settings):
    model = model or tiny("llama")
    return model, inlay.attach(model, inlay.AdaLoRA(sites=("attn.q", "ffn.up"), **SMALL | settings))


def tensors(adapter):
    return {n: p.detach().clone() for n, p in adapter.state_dict().items()}


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        model(**batch(model, seed=i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def pieces_of(adapter):
    return list(adapter.pieces.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.proves("oracle", "adalora")
def test_equals_dense(family):
    model = tiny(family)
    adapter = inlay.attach(model, inlay.AdaLoRA(init_rank=4, target_rank=2, alpha=8))
    randomise(adapter)
    scale = 8 / (4 + 1e-5)
    assert_equals_dense(model, adapter, lambda t, W, b: (W + scale * t["P"] @ torch.diag(t["Lambda"]) @ t["Q"], b))
    piece = pieces_of(adapter)[0]
    torch.testing.assert_close(piece.weight_delta(), scale * piece.P @ torch.diag(piece.Lambda) @ piece.Q)


def test_initialisation():
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    inputs = batch(model, labels=False)
    with torch.no_grad():
        before = model(**inputs).logits
        adapter = inlay.attach(model, inlay.AdaLoRA())
        assert torch.equal(model(**inputs).logits, before)
    for piece in pieces_of(adapter):
        assert not piece.Lambda.any()
        assert float(piece.P.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert float(piece.Q.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("t", "budget"), [(500, 864), (501, 863), (750, 697), (1000, 612), (1250, 580), (1500, 576)])
def test_published_budget_sequence(t, budget):
    """72 matrices, 12 -> 8, ti 500, tf 1500, T 3000. Equation 14 as printed would give more than b0 = 864 at t = ti."""
    method = inlay.AdaLoRA(target_rank=8, init_rank=12, warmup=500, final=1500)
    assert allocation(method, t, 3000, 72 * 12, 72 * 8)[0] == budget


@given(
    st.integers(3, 400),
    st.floats(0, 0.45),
    st.floats(0, 0.45),
    st.integers(1, 20),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_budget_falls_from_the_first_value_to_the_last(total, warmup, final, interval, target, more):
    method = inlay.AdaLoRA(
        target_rank=target, init_rank=target + more or 1, warmup=warmup, final=final, interval=interval
    )
    ti, tf = phases(method, total)
    found = [allocation(method, t, total, 10 * (target + more), 10 * target) for t in range(1, total + 1)]
    budgets = [b for b, _ in found]
    assert budgets == sorted(budgets, reverse=True)
    assert all(b == 10 * (target + more) for b in budgets[:ti])
    assert all(entry == (10 * target, True) for entry in found[total - tf - 1 :])
    assert [t for t, (_, due) in enumerate(found, 1) if due and t < total - tf] == [
        t for t in range(ti + 1, total - tf) if t % interval == 0
    ]


def test_phases_are_steps_or_shares():
    assert phases(inlay.AdaLoRA(warmup=0.1, final=0.3), 200) == (20, 60)
    assert phases(inlay.AdaLoRA(warmup=7, final=0), 200) == (7, 0)
    with pytest.raises(MethodError, match="Train longer"):
        phases(inlay.AdaLoRA(warmup=100, final=100), 200)
    with pytest.raises(MethodError, match="Train longer"):
        inlay.attach(tiny("llama"), inlay.AdaLoRA(warmup=100, final=100, total_steps=200))


@pytest.mark.parametrize("follow", ["code", "paper"])
def test_penalty_gradient_is_that_of_autograd(follow):
    _, adapter = attached(orthogonality=0.3, follow=follow)
    randomise(adapter)
    pieces = pieces_of(adapter)
    budget_of(adapter)._add_penalty(grad_scale=8.0)
    leaves = [[t.detach().clone().requires_grad_() for t in (p.P, p.Q)] for p in pieces]
    norms = [torch.linalg.norm(g - torch.eye(3)) for P, Q in leaves for g in (P.T @ P, Q @ Q.T)]
    penalty = torch.stack(norms).mean() if follow == "code" else torch.stack(norms).square().sum()
    (0.3 * penalty).backward()
    for piece, (P, Q) in zip(pieces, leaves, strict=True):
        torch.testing.assert_close(piece.P.grad, 8 * P.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(piece.Q.grad, 8 * Q.grad, rtol=1e-4, atol=1e-5)
        assert piece.Lambda.grad is None


def test_penalty_at_orthonormal_vectors_is_no_nan():
    _, adapter = attached(init_rank=2)
    piece = pieces_of(adapter)[0]
    with torch.no_grad():
        piece.P.copy_(torch.eye(piece.P.shape[0])[:, :2])
        piece.Q.copy_(torch.eye(piece.Q.shape[1])[:2])
    budget_of(adapter)._add_penalty(1.0)
    assert not piece.P.grad.any()
    assert not piece.Q.grad.any()


@pytest.mark.parametrize("follow", ["code", "paper"])
def test_scores_and_masks_are_those_of_the_equations(follow):
    """The whole algorithm once more, entry by entry as printed, next to a bare loop."""
    model, adapter = attached(follow=follow, orthogonality=0.2)
    randomise(adapter, 0.05)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    names = [n for n, _ in adapter.named_parameters()]
    mean, spread = ({n: torch.zeros_like(p) for n, p in adapter.named_parameters()} for _ in range(2))
    kept = {k: torch.ones(3, dtype=torch.bool) for k in adapter.pieces}
    b0, bT = 3 * 4, 1 * 4
    for t in range(1, 13):
        model(**batch(model, seed=t)).loss.backward()
        before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        optimizer.step()
        after, w = tensors(adapter), before
        # Gradients still hold the penalty's; the step was w - 0.05 g, before Λ was masked.
        grads = {n: p.grad.clone() for n, p in adapter.named_parameters()}
        stepped = {n: torch.add(before[n], grads[n], alpha=-0.05) for n in names}
        w = stepped if follow == "code" else before
        if t < 8:
            for n in names:
                sensitivity = (w[n] * grads[n]).abs()
                mean[n] = 0.85 * mean[n] + 0.15 * sensitivity
                spread[n] = 0.85 * spread[n] + 0.15 * (sensitivity - mean[n]).abs()
        budget = bT if t >= 8 else b0 if t <= 2 else int(bT + (b0 - bT) * (1 - (t - 2) / (12 - 4 - 2)) ** 3)
        if t >= 8 or (t > 2 and t % 2 == 0):
            s = {n: mean[n] * spread[n] for n in names}
            S = {k: s[f"{k}.Lambda"] + s[f"{k}.P"].mean(0) + s[f"{k}.Q"].mean(1) for k in kept}
            best = torch.cat(list(S.values())).sort(descending=True).values[:budget].min()
            kept = {k: S[k] >= best for k in kept}
            for k in kept:
                assert torch.equal(adapter.pieces[k].kept, kept[k]), t
                assert torch.equal(after[f"{k}.Lambda"], torch.where(kept[k], stepped[f"{k}.Lambda"], 0.0)), t
            assert sum(int(k.sum()) for k in kept.values()) == budget
        optimizer.zero_grad()
    assert sum(ranks(adapter).values()) == bT
    assert ranks(adapter) == {k: int(m.sum()) for k, m in kept.items()}


def test_scores_are_frozen_in_the_final_phase():
    model, adapter = attached()
    randomise(adapter, 0.05)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    train(model, optimizer, 8)
    scores = [s.clone() for s in budget_of(adapter).scores()]
    chosen = [p.kept.clone() for p in pieces_of(adapter)]
    train(model, optimizer, 4, start=8)
    assert all(torch.equal(a, b) for a, b in zip(scores, budget_of(adapter).scores(), strict=True))
    assert all(torch.equal(a, p.kept) for a, p in zip(chosen, pieces_of(adapter), strict=True))
    assert all(not p.Lambda[~p.kept].any() for p in pieces_of(adapter))


def test_equals_peft_in_logits_and_masks():
    """The same tensors, data and optimizer: equal parameters and equal masks after every step.

    Without a task type PEFT 0.21.2 goes past the forward pass that adds its penalty.
    """
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        target_r=1, init_r=3, tinit=2, tfinal=4, deltaT=2, total_step=12, orth_reg_weight=0.2, lora_alpha=6,
        target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny("llama"), config)
    model, adapter = attached(alpha=6, orthogonality=0.2)
    randomise(adapter, 0.05)
    pairs = []
    for site, piece in zip(adapter.sites, pieces_of(adapter), strict=True):
        layer = theirs.get_submodule("base_model.model." + site.leave)
        pairs.append((piece, layer))
        with torch.no_grad():
            layer.lora_A["default"].copy_(piece.Q)
            layer.lora_B["default"].copy_(piece.P)
            layer.lora_E["default"].copy_(piece.Lambda[:, None])
    with torch.no_grad():
        inputs = batch(model, labels=False)
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
    ours = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.0)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for t in range(1, 13):
        inputs = batch(model, seed=t)
        model(**inputs).loss.backward()
        ours.step()
        ours.zero_grad()
        theirs(**inputs).loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(t)
        other.zero_grad()
        for piece, layer in pairs:
            assert torch.equal(piece.Lambda != 0, layer.lora_E["default"][:, 0] != 0), t
            torch.testing.assert_close(piece.Lambda, layer.lora_E["default"][:, 0], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(piece.P, layer.lora_B["default"], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(piece.Q, layer.lora_A["default"], rtol=1e-3, atol=1e-5)
    assert sum(ranks(adapter).values()) == 4
    assert {int((p.Lambda != 0).sum()) for p, _ in pairs} != {1}, "every site kept the same rank: a weak test"


def test_without_a_number_of_steps_the_first_step_says_how_to_give_it():
    model, adapter = attached(total_steps=None)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(**batch(model)).loss.backward()
    before = tensors(adapter)
    with pytest.raises(MethodError, match="set_total_steps"):
        optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in tensors(adapter).items())
    set_total_steps(adapter, 12)
    optimizer.step()
    assert int(budget_of(adapter).step) == 1


def test_begin_tells_the_number_of_steps():
    _, adapter = attached(total_steps=None)
    for piece in adapter.pieces.values():
        piece.begin(20)
    assert int(budget_of(adapter).total_steps) == 20
    _, adapter = attached(total_steps=12)
    with pytest.raises(MethodError, match="run has 20"):
        set_total_steps(adapter, 20)
    with pytest.raises(MethodError, match="AdaLoRA"):
        set_total_steps(inlay.attach(tiny("llama"), inlay.LoRA()), 20)


def bare(model, adapter):
    return train(model, torch.optim.AdamW(adapter.parameters(), lr=0.01), 12)


def accumulated(model, adapter):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for i in range(12):
        for _ in range(4):
            (model(**batch(model, seed=i)).loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def closure(model, adapter):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for i in range(12):

        def evaluate(i=i):
            optimizer.zero_grad()
            loss = model(**batch(model, seed=i)).loss
            loss.backward()
            return loss

        optimizer.step(evaluate)


def scaled(model, adapter, fused=False, clip=False):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(12):
        scaler.scale(model(**batch(model, seed=i)).loss).backward()
        if clip:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def fused(model, adapter):
    return scaled(model, adapter, fused=True)


def unscaled(model, adapter):
    return scaled(model, adapter, fused=True, clip=True)


@pytest.mark.parametrize("loop", [accumulated, closure, scaled, fused, unscaled])
def test_every_kind_of_loop_gives_what_a_bare_loop_gives(loop):
    """Accumulation, closures and gradient scaling change nothing but rounding."""
    found = []
    for kind in (bare, loop):
        torch.manual_seed(0)
        model, adapter = attached(orthogonality=0.2)
        randomise(adapter, 0.05)
        kind(model, adapter)
        assert int(budget_of(adapter).step) == 12
        found.append(tensors(adapter))
    for name, tensor in found[0].items():
        if tensor.dtype == torch.bool:
            assert torch.equal(found[1][name], tensor), name
        elif "uncertainty" not in name and "sensitivity" not in name:
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_step_skipped_for_overflow_does_not_count():
    for fast in (False, True):
        model, adapter = attached()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=fast)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        before = tensors(adapter)
        scaler.scale(model(**batch(model)).loss).backward()
        pieces_of(adapter)[0].P.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(before[n], t) for n, t in tensors(adapter).items())


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, adapter = attached()
    rows = [{k: v[0] for k, v in batch(model, rows=1, seed=i).items()} for i in range(24)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert int(budget_of(adapter).step) == 12
    assert sum(ranks(adapter).values()) == 4


def test_resuming_gives_the_bits_of_an_uninterrupted_run():
    runs = []
    for cut in (12, 5):
        torch.manual_seed(0)
        model, adapter = attached()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        train(model, optimizer, cut)
        if cut < 12:
            state, moments = copy.deepcopy(adapter.state_dict()), copy.deepcopy(optimizer.state_dict())
            torch.manual_seed(1)
            model, adapter = attached()
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
            adapter.load_state_dict(state)
            optimizer.load_state_dict(moments)
            train(model, optimizer, 12 - cut, start=cut)
        runs.append(tensors(adapter))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


@pytest.mark.parametrize("steps", [0, 5, 12])
def test_folder_holds_the_kept_triplets_and_gives_the_same_bits(tmp_path, steps):
    """After 5 steps pruned triplets are revived until the next allocation: they act, so they are stored."""
    model, adapter = attached(target_rank=0 if steps == 12 else 1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    train(model, optimizer, steps)
    inputs = batch(model, labels=False)
    with torch.no_grad():
        before = model(**inputs).logits
        adapter.save(tmp_path / "a")
        found = inlay.load(without_adapters(model), tmp_path / "a")
        assert torch.equal(found.model(**inputs).logits, before)
    assert ranks(found) == ranks(adapter)
    kept = sum(ranks(adapter).values())
    assert kept == {0: 12, 5: 12, 12: 0}[steps]
    sizes = [p.P.shape[0] + p.Q.shape[1] + 1 for p in pieces_of(adapter)]
    wanted = sum(r * size for r, size in zip(ranks(adapter).values(), sizes, strict=True))
    assert adapter.stored_parameters == wanted + 12, "P, Λ and Q of the kept triplets, and which they are"
    found.save(tmp_path / "b")
    assert (tmp_path / "b" / "adapter.safetensors").read_bytes() == (
        tmp_path / "a" / "adapter.safetensors"
    ).read_bytes()


def test_a_site_of_rank_zero_trains_and_runs():
    model, adapter = attached(target_rank=0, total_steps=20)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    inputs = batch(model, labels=False)
    base = without_adapters(model)(**inputs).logits
    train(model, optimizer, 20)
    assert set(ranks(adapter).values()) == {0}
    assert torch.equal(model(**inputs).logits, base)


def test_sites_that_get_no_gradient_count_as_insensitive():
    model, adapter = attached(total_steps=20)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    first = pieces_of(adapter)[0]
    model(**batch(model)).loss.backward()
    for p in first.parameters():
        p.grad = None
    optimizer.step()
    assert not first.sensitivity_Lambda.any()
    assert pieces_of(adapter)[1].sensitivity_Lambda.any() or pieces_of(adapter)[1].sensitivity_P.any()


def test_only_the_adapter_that_was_trained_takes_a_step():
    model, first = attached(total_steps=20)
    second = inlay.attach(model, first.method, name="second")
    optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=0.01)
    inlay.use(model, "second")
    train(model, optimizer, 3)
    assert (int(budget_of(first).step), int(budget_of(second).step)) == (0, 3)


def test_one_optimizer_must_hold_all_of_it():
    model, adapter = attached()
    some = list(adapter.parameters())[1:]
    optimizer = torch.optim.SGD(some, lr=0.1)
    model(**batch(model)).loss.backward()
    with pytest.raises(MethodError, match="one optimizer"):
        optimizer.step()
    groups = [{"params": some, "lr": 0.1}, {"params": list(adapter.parameters())[:1], "lr": 0.2}]
    torch.optim.SGD(groups).step()
    assert int(budget_of(adapter).step) == 1


def test_a_copy_has_a_live_budget_of_its_own():
    model, adapter = attached()
    twin = copy.deepcopy(model)
    other = inlay.adapters(twin)["default"]
    assert budget_of(other) is not budget_of(adapter)
    assert budget_of(other).pieces == tuple(pieces_of(other))
    train(twin, torch.optim.SGD(other.parameters(), lr=0.1), 2)
    assert (int(budget_of(adapter).step), int(budget_of(other).step)) == (0, 2)


def test_the_budget_ends_with_its_adapter():
    gc.collect()
    watched = len(stepping._watched)
    model, adapter = attached()
    assert len(stepping._watched) == watched + 1
    adapter.detach()
    del adapter, model
    gc.collect()
    assert len(stepping._watched) == watched


def test_rank_map(tmp_path):
    model, adapter = attached()
    train(model, torch.optim.AdamW(adapter.parameters(), lr=0.01), 12)
    rows, columns, table = by_layer(model, adapter.sites, list(ranks(adapter).values()))
    assert (rows, columns) == (["0", "1"], ["attn.q", "ffn.up"])
    assert sum(map(sum, table)) == 4
    figure = rank_map(adapter, str(tmp_path / "ranks.png"))
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(t.get_text() for t in figure.axes[0].texts) == sorted(f"{int(v)}" for r in table for v in r)


@pytest.mark.parametrize("settings", [
    {"target_rank": 9, "init_rank": 8}, {"init_rank": 0}, {"beta1": 1.0}, {"warmup": 1.5}, {"final": -1},
    {"interval": 0}, {"follow": "both"}, {"no_such": 1},
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError):  # noqa: PT011
        inlay.AdaLoRA(**settings)


@pytest.mark.parametrize("sites", ["embed", "norm", "ffn"])
def test_sites_that_are_no_projections_are_refused(sites):
    with pytest.raises(ValueError, match=r"projection|matches nothing"):
        inlay.attach(tiny("llama"), inlay.AdaLoRA(sites=sites))
