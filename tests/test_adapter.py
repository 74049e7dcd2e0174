"""attach, use, detach: what a user may rely on, whatever the method."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import nn

import inlay
from inlay.errors import AdapterError, AttachmentError, FormatError, MethodError, QuantizationError, SiteError
from tiny import batch, tiny


def shake(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def features(model, **changes):
    inputs = batch(model, **changes)
    labels = inputs.pop("labels")
    return inputs | ({"decoder_input_ids": labels.clamp_min(0)} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(model, **changes):
    return model(**features(model, **changes)).logits


def snapshot(model):
    return (
        {n: (type(m), id(m)) for n, m in model.named_modules()},
        {n: (id(p), p.requires_grad, p.clone()) for n, p in model.named_parameters()},
        list(model.state_dict()),
    )


def assert_restored(model, before):
    modules, parameters, keys = before
    assert {n: (type(m), id(m)) for n, m in model.named_modules()} == modules
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        identity, requires_grad, value = parameters[name]
        assert id(parameter) == identity
        assert parameter.requires_grad == requires_grad
        assert torch.equal(parameter, value)
    assert "_inlay_state" not in model.__dict__


def test_attach_freezes_the_base_and_detach_gives_every_flag_back():
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".inlay." in n}
    assert sum(p.numel() for p in adapter.parameters()) == adapter.trained_parameters
    adapter.detach()
    assert_restored(model, before)


def test_a_second_adapter_neither_trains_nor_moves_the_first():
    model = tiny("bert")
    first = inlay.attach(model, inlay.LoRA(rank=2), name="first")
    shake(first)
    kept = {n: t.clone() for n, t in first.state_dict().items()}
    second = inlay.attach(model, inlay.Bottleneck(size=3), name="second")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(**batch(model)).loss.backward()
    optimizer.step()
    assert all(torch.equal(kept[n], t) for n, t in first.state_dict().items())
    assert all(p.grad is not None for p in second.parameters())


def test_each_adapter_has_its_own_head():
    model = tiny("bert")
    base_head = model.classifier.weight.clone()
    a = inlay.attach(model, inlay.HeadOnly(), name="a")
    shake(a)
    b = inlay.attach(model, inlay.HeadOnly(), name="b")
    with inlay.use(model, "a"):
        from_a = logits(model)
    assert not torch.equal(from_a, logits(model))
    assert torch.equal(model.classifier.weight, base_head)
    assert {n for n, _ in b.named_parameters()} == {"classifier.head.module.weight", "classifier.head.module.bias"}


def test_use_takes_effect_at_once_and_a_with_block_puts_the_former_back():
    model = tiny("gpt2")
    base = logits(model)
    a = inlay.attach(model, inlay.LoRA(rank=2), name="a")
    shake(a)
    with_a = logits(model)
    with inlay.use(model, None):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_a)
    inlay.use(model, None)
    assert torch.equal(logits(model), base)


def test_several_adapters_on_the_same_rows_act_in_the_order_named():
    model = tiny("llama")
    a = inlay.attach(model, inlay.Bottleneck(size=3), name="a")
    b = inlay.attach(model, inlay.Bottleneck(size=3), name="b")
    shake(a, 1)
    shake(b, 2)
    with inlay.use(model, ("a", "b")):
        ab = logits(model)
    with inlay.use(model, ("b", "a")):
        ba = logits(model)
    assert not torch.allclose(ab, ba)  # each sequential piece reads what the ones before it made
    with inlay.use(model, ("a",)):
        assert not torch.allclose(logits(model), ab)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bart", "opt"])
def test_every_row_of_a_batch_with_its_own_adapters_equals_the_row_alone(family):
    model = tiny(family)
    shake(inlay.attach(model, inlay.LoRA(rank=2), name="lora"), 1)
    shake(inlay.attach(model, inlay.Bottleneck(size=3), name="seq", head=None), 2)
    shake(inlay.attach(model, inlay.Bottleneck.pfeiffer(size=3), name="pfeiffer"), 3)
    shake(inlay.attach(model, inlay.Full(), name="full"), 4)
    rows = ["lora", None, "pfeiffer", ("lora", "seq"), "full", "lora"]
    inputs = features(model, rows=len(rows))
    with torch.no_grad(), inlay.use(model, rows):
        mixed = model(**inputs).logits
    for i, names in enumerate(rows):
        with torch.no_grad(), inlay.use(model, names):
            alone = model(**inputs).logits
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-5, atol=1e-5, msg=f"row {i} {names}")


def test_gradients_of_a_mixed_batch_reach_only_the_rows_own_adapter():
    model = tiny("llama", dtype=torch.float64)
    a = inlay.attach(model, inlay.LoRA(rank=2), name="a")
    b = inlay.attach(model, inlay.LoRA(rank=2), name="b")
    shake(a, 1)
    shake(b, 2)
    inputs = batch(model, rows=4)
    with inlay.use(model, ["a", "b", "a", None]):
        out = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    out[[0, 2]].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in b.parameters())
    mixed = {n: p.grad.clone() for n, p in a.named_parameters()}
    for p in a.parameters():
        p.grad = None
    with inlay.use(model, "a"):
        model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[[0, 2]].square().sum().backward()
    for name, parameter in a.named_parameters():
        torch.testing.assert_close(mixed[name], parameter.grad, rtol=1e-6, atol=1e-9)


def test_generate_with_an_adapter_for_each_row_and_beams():
    model = tiny("llama")
    shake(inlay.attach(model, inlay.LoRA(rank=4), name="a"), 1)
    shake(inlay.attach(model, inlay.Bottleneck(size=3), name="b"), 2)
    ids = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        with inlay.use(model, ["b", None, "a"]):
            mixed = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **settings)
        for i, name in enumerate(["b", None, "a"]):
            with inlay.use(model, name):
                row = ids[i : i + 1]
                alone = model.generate(row, attention_mask=torch.ones_like(row), num_beams=beams, **settings)
            n = alone.shape[1]
            assert torch.equal(mixed[i : i + 1, :n], alone)


def test_wrong_rows_are_refused_by_row():
    model = tiny("llama")
    inlay.attach(model, inlay.LoRA(rank=2), name="legal")
    with pytest.raises(AdapterError, match=r"no adapter 'legall' .*row 1.*did you mean 'legal'"):
        inlay.use(model, ["legal", "legall"])
    with (
        pytest.raises(AdapterError, match="use\\(\\) was given 2 rows, but the batch has 3"),
        inlay.use(model, [None, "legal"]),
    ):
        logits(model, rows=3)
    with pytest.raises(AdapterError, match="given 4 rows"), inlay.use(model, ["legal"] * 4):
        logits(model, rows=2)
    with pytest.raises(AdapterError, match="empty list"):
        inlay.use(model, [])
    assert logits(model).shape[0] == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bart"])
def test_copies_and_pickles_are_whole_and_independent(family):
    model = tiny(family)
    adapter = inlay.attach(model, inlay.LoRA(rank=2) + inlay.Bottleneck(size=3))
    shake(adapter)
    expected = logits(model)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (clone, loaded):
        assert torch.equal(logits(other), expected)
        assert inlay.adapters(other)["default"].model is other
        shake(inlay.adapters(other)["default"], 9)
        assert not torch.equal(logits(other), expected)
        inlay.detach(other)
        assert not any("inlay" in n for n in other.state_dict())
    assert torch.equal(logits(model), expected)


def test_compile_sees_an_adapter_attached_afterwards():
    model = tiny("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = features(model)
    with torch.no_grad():
        base = compiled(**ids).logits
        adapter = inlay.attach(model, inlay.LoRA(rank=2) + inlay.Bottleneck(size=3))
        shake(adapter)
        adapted = compiled(**ids).logits
        assert not torch.allclose(adapted, base)
        torch.testing.assert_close(adapted, model(**ids).logits, rtol=1e-5, atol=1e-5)
        with inlay.use(model, None):
            torch.testing.assert_close(compiled(**ids).logits, base)
        with inlay.use(model, ["default", None, "default"]):
            mixed = compiled(**ids).logits
        torch.testing.assert_close(mixed[1], base[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[2], adapted[2], rtol=1e-5, atol=1e-5)


def test_a_plain_module_takes_adapters_by_path_without_being_run():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    base = model(x)
    adapter = inlay.attach(model, inlay.LoRA(rank=2, sites=("0", "2")))
    assert torch.equal(model(x), base)
    shake(adapter)
    a = {n: p.detach() for n, p in adapter.named_parameters()}
    w0 = model[0].weight + 8 * a["0.lora.B"] @ a["0.lora.A"]
    w2 = model[2].weight + 8 * a["2.lora.B"] @ a["2.lora.A"]
    want = torch.relu(x @ w0.T + model[0].bias) @ w2.T + model[2].bias
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_refusals_leave_the_model_untouched():
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(SiteError, match=r"'q_prok'.*did you mean 'q_proj'"):
        inlay.attach(model, inlay.LoRA(sites=("v_proj", "q_prok")))
    with pytest.raises(MethodError, match="LlamaForCausalLM has none"):
        inlay.attach(model, inlay.BitFit())
    with pytest.raises(SiteError, match="layers"):
        inlay.attach(model, inlay.LoRA(layers=(5,)))
    with pytest.raises(AdapterError, match="letters, digits"):
        inlay.attach(model, inlay.LoRA(), name="a.b")
    with pytest.raises(MethodError, match="rank: must be greater than 0"):
        inlay.attach(model, inlay.LoRA(rank=0))
    with pytest.raises(AdapterError, match="no adapter is attached"):
        inlay.use(model, None)
    assert_restored(model, before)


def test_a_module_wrapped_afterwards_is_not_torn_apart():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q"))
    layer = model.model.layers[0].self_attn
    torch.nn.utils.parametrize.register_parametrization(layer.q_proj, "weight", nn.Identity())
    with pytest.raises(AttachmentError, match=r"layers.0.self_attn.q_proj"):
        adapter.detach()
    torch.nn.utils.parametrize.remove_parametrizations(layer.q_proj, "weight")
    adapter.detach()
    assert type(layer.q_proj) is nn.Linear


def test_state_dict_round_trip_is_strict():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    state = {n: torch.ones_like(t) for n, t in adapter.state_dict().items()}
    adapter.load_state_dict(state)
    assert all(torch.equal(t, torch.ones_like(t)) for t in adapter.parameters())
    first = next(iter(state))
    with pytest.raises(FormatError, match="missing"):
        adapter.load_state_dict({n: t for n, t in state.items() if n != first})


def test_print_shows_counts_sites_and_source():
    text = str(inlay.attach(tiny("llama"), inlay.LoRA(rank=2), name="legal"))
    assert "adapter 'legal'" in text
    assert "trained   " in text
    assert "LoRA: Low-Rank Adaptation" in text


def test_citation_holds_every_part_of_a_mix_once():
    text = inlay.citation(inlay.LoRA() + inlay.LoRA() + inlay.BitFit())
    assert text.count("@inproceedings") == 2


def test_a_table_that_sees_no_rows_cannot_differ_by_row():
    """T5's table of relative positions is indexed by distances: as many tokens as rows must not be mistaken."""
    model = tiny("t5")
    inlay.attach(model, inlay.Full(), name="full")
    with pytest.raises(AdapterError, match=r"relative_attention_bias sees tokens without the row"):
        inlay.use(model, ["full", None])
    inlay.use(model, ["full", "full"])


def test_a_model_placed_by_accelerate_runs_its_adapter():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny("llama")
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    base = logits(model)
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    assert torch.equal(logits(model), base)
    shake(adapter)
    assert not torch.allclose(logits(model), base)
    adapter.detach()
    assert torch.equal(logits(model), base)


def test_a_forward_replaced_on_a_module_is_refused():
    model = tiny("llama")
    linear = model.model.layers[0].self_attn.q_proj
    linear.forward = lambda x: torch.zeros(*x.shape[:-1], 32)
    with pytest.raises(AttachmentError, match=r"q_proj: its forward was replaced"):
        inlay.attach(model, inlay.LoRA(rank=2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: inlay.LoRA(rnk=8), MethodError, "rnk: unknown key; did you mean 'rank'"),
        (lambda: inlay.LoRA(rank="x"), MethodError, "rank: expected a whole number or a mapping, got 'x'"),
        (lambda: inlay.LoRA(rank={"ffn": 0}), MethodError, "rank: must be greater than 0, got 0"),
        (lambda: inlay.LoRA(alpha=float("nan")), MethodError, "alpha: must be a finite number"),
        (lambda: inlay.DoRA(init="kaimin"), MethodError, "did you mean 'kaiming'"),
        (lambda: inlay.Bottleneck.houlsby(size=0), MethodError, "Bottleneck: size: must be"),
        (lambda: inlay.NF4(block_size=7), QuantizationError, "block_size: expected one of 32, 64"),
        (lambda: inlay.attach(5, inlay.LoRA()), AttachmentError, "torch.nn.Module"),
    ],
)
def test_wrong_settings_are_told_in_words(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()
