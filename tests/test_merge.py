"""Merging: equal results, exact removal, refusals by name, ties, quantised bases, several adapters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import inlay
from comparing import bits, logits, randomise, same_bits
from inlay.errors import AdapterError, MergeError
from inlay.fold import DenseLinear
from inlay.merge import merge
from inlay.quant import weight_of
from inlay.quant.model import quantize
from tiny import tiny

SIX = ("llama", "gpt2", "bert", "t5", "bart", "gpt_neox")


def methods(family: str) -> list[inlay.Method]:
    made = [
        inlay.LoRA(rank=3, sites=("linear", "embed")),
        inlay.LoRA(rank=3, rslora=True, sites=("attn.q", "attn.v", "ffn")[:2]),
        inlay.DoRA(rank=3, sites=("attn.q", "ffn.down")),
        inlay.IA3(),
        inlay.LoRA(rank=2, sites="attn.v") + inlay.IA3(),
        inlay.Full(sites="norm") + inlay.LoRA(rank=2),
    ]
    if family not in ("llama", "t5"):
        made.append(inlay.BitFit())
    return made


@pytest.mark.parametrize("family", SIX)
def test_merged_is_the_same_function_and_unmerge_restores_every_bit(family):
    model = tiny(family)
    before, objects = bits(model), {n: id(p) for n, p in model.named_parameters()}
    plain, keys = logits(model), list(model.state_dict())
    for i, method in enumerate(methods(family)):
        adapter = randomise(inlay.attach(model, method), i)
        with_adapter = logits(model)
        assert not torch.allclose(with_adapter, plain, atol=1e-2), method
        report = adapter.merge()
        assert report.ratio < 1e-5
        assert not report.rest
        assert all(m._inlay.plan is None for m in model.modules() if hasattr(m, "_inlay")), "something acts twice"
        torch.testing.assert_close(logits(model), with_adapter, atol=1e-5, rtol=1e-5, msg=str(method))
        adapter.unmerge()
        assert same_bits(model, before), method
        assert torch.equal(logits(model), with_adapter), method
        adapter.merge()
        adapter.detach()  # takes it out first
        assert same_bits(model, before)
        assert list(model.state_dict()) == keys
        assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert torch.equal(logits(model), plain)


def test_fused_parts_go_into_their_rows_only():
    model = tiny("gpt2")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.v")))
    conv = model.transformer.h[0].attn.c_attn
    before, piece = conv.weight.detach().clone(), next(iter(adapter.pieces.values()))
    adapter.merge()
    changed = (conv.weight - before).T
    assert torch.equal(changed[:64], torch.zeros_like(changed[:64]))
    torch.testing.assert_close(changed[64:], piece.weight_delta(), atol=1e-6, rtol=0)


def test_bf16_rounds_once_and_the_report_says_what_it_cost():
    model = tiny("llama", dtype=torch.bfloat16)
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")), size=0.02)
    before, path = bits(model), "model.layers.0.self_attn.q_proj"
    weight, delta = before[f"{path}.weight"].float(), adapter.pieces[f"{path}.lora"].weight_delta().detach()
    report = adapter.merge()
    merged = model.get_parameter(f"{path}.weight")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight + delta).bfloat16())
    damage = next(d for d in report.damages if d.path == path)
    error = (merged.float() - weight - delta).norm() / delta.norm()
    assert damage.ratio == pytest.approx(float(error), rel=1e-4)
    assert damage.ratio > 1e-3
    assert path in str(report)
    adapter.unmerge()
    assert same_bits(model, before)


def test_what_is_not_linear_is_refused_by_name_and_nothing_changes():
    model = tiny("llama")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q") + inlay.Bottleneck(size=4)))
    before, y = bits(model), logits(model)
    with pytest.raises(MergeError, match=r"(?s)model\.layers\.0\.mlp\.down_proj.*parts=\"linear\""):
        adapter.merge()
    assert not adapter.merged
    assert same_bits(model, before)
    assert torch.equal(logits(model), y)
    report = adapter.merge(parts="linear")
    assert "BottleneckDelta" in str(report.rest)
    assert report.merged == tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    adapter.unmerge()
    assert same_bits(model, before)
    assert torch.equal(logits(model), y)


def test_an_adapter_without_any_linear_part_is_refused():
    model = tiny("llama")
    for method in (inlay.Bottleneck(size=4), inlay.Prefix(length=3)):
        adapter = inlay.attach(model, method, name="x")
        for parts in ("all", "linear"):
            with pytest.raises(MergeError, match="cannot be merged exactly"):
                adapter.merge(parts=parts)
        adapter.detach()


def test_a_linear_piece_behind_a_nonlinear_one_at_the_same_module_stays():
    model = tiny("llama")
    adapter = inlay.attach(
        model, inlay.Bottleneck(size=4, sites="ffn") + inlay.LoRA(rank=2, sites=("ffn.down", "attn.q"))
    )
    randomise(adapter)
    y = logits(model)
    report = adapter.merge(parts="linear")
    assert all("q_proj" in path for path in report.merged)
    assert any("after a piece" in why for why in report.rest.values())
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "llama"])
def test_a_merged_head_is_untied_from_the_embedding(family):
    model = tiny(family, tie_word_embeddings=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    tie = model.config.tie_word_embeddings
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites=("lm_head", "attn.q"))))
    y, before = logits(model), embedding.weight.detach().clone()
    adapter.merge()
    assert head.weight is not embedding.weight
    assert torch.equal(embedding.weight, before)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    if family in ("gpt2", "llama"):
        assert model.config.tie_word_embeddings is False
        model.tie_weights()
        torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    adapter.unmerge()
    assert head.weight is embedding.weight
    assert model.config.tie_word_embeddings == tie


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "bart"])
def test_merged_then_saved_loads_in_plain_transformers(family, tmp_path):
    model = tiny(family)
    sites = ("linear", "embed", "lm_head") if family in ("gpt2", "t5", "bart") else ("linear", "embed")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites=sites)))
    y = logits(model)
    adapter.merge(permanent=True)
    assert inlay.adapters(model) == {}
    assert not any("inlay" in n for n in model.state_dict())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), y, atol=1e-5, rtol=1e-5)


def test_permanent_leaves_a_plain_trainable_model():
    model = tiny("bert")
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2) + inlay.BitFit()))
    y = logits(model)
    adapter.merge(permanent=True)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


def test_a_trained_head_is_swapped_in_and_out_again():
    model = tiny("bert")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2)))
    assert any(".head" in key for key in adapter.pieces)
    head, y = model.classifier.weight, logits(model)
    adapter.merge()
    assert model.classifier.weight is not head
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    adapter.unmerge()
    assert model.classifier.weight is head
    assert torch.equal(logits(model), y)


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused():
    model = tiny("llama")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2)))
    with pytest.raises(MergeError, match="is not merged"):
        adapter.unmerge()
    adapter.merge()
    with pytest.raises(MergeError, match="merged already"):
        adapter.merge()
    with pytest.raises(AdapterError, match="unmerge"):
        adapter.load_state_dict(adapter.state_dict())
    adapter.detach()
    with pytest.raises(AdapterError, match="not attached"):
        merge(adapter)


def test_saving_while_merged_writes_the_adapter(tmp_path):
    model = tiny("bert")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2), name="a"))
    y = logits(model)
    adapter.merge()
    adapter.save(tmp_path / "a")
    adapter.detach()
    inlay.load(model, tmp_path / "a", "b")
    assert torch.equal(logits(model), y)


def test_changing_the_weights_while_merged_is_noticed():
    model = tiny("llama")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")))
    adapter.merge()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    with pytest.raises(MergeError, match="changed after"):
        adapter.unmerge()


def test_casting_and_copying_while_merged():
    model = tiny("llama")
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")))
    y, weight = logits(model), model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapter.merge()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        inlay.adapters(twin)["default"].unmerge()
        assert torch.equal(logits(twin), y)
        assert torch.equal(twin.model.layers[0].self_attn.q_proj.weight, weight)
    assert adapter.merged
    model.double()
    adapter.unmerge()
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), y, atol=1e-5, rtol=1e-5)


def test_several_merged_adapters_come_out_in_any_order():
    model = tiny("llama")
    before = bits(model)
    a = randomise(inlay.attach(model, inlay.LoRA(rank=2), name="a"), 1)
    b = randomise(inlay.attach(model, inlay.LoRA(rank=3), name="b"), 2)
    with inlay.use(model, "b"):
        only_b = logits(model)
    inlay.use(model, ("a", "b"))
    both = logits(model)
    a.merge()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    b.merge()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    a.unmerge()
    assert not a.merged
    assert b.merged
    inlay.use(model, "b")
    torch.testing.assert_close(logits(model), only_b, atol=1e-5, rtol=1e-5)
    b.unmerge()
    assert same_bits(model, before)
    a.merge()
    b.merge()
    inlay.detach(model)
    assert same_bits(model, before)


def test_a_merged_adapter_is_on_every_row_and_a_route_must_say_so():
    model = tiny("llama")
    randomise(inlay.attach(model, inlay.LoRA(rank=2), name="a"), 1).merge()
    randomise(inlay.attach(model, inlay.LoRA(rank=2), name="b"), 2)  # comes beside "a"
    for rows in (None, "b", ("b", "a"), ["a", None, "a"]):
        with pytest.raises(AdapterError, match="merged into the weights"):
            inlay.use(model, rows)
    inlay.use(model, ["a", ("a", "b"), "a"])
    mixed = logits(model)
    inlay.adapters(model)["a"].unmerge()
    torch.testing.assert_close(logits(model), mixed, atol=1e-5, rtol=1e-5)


def test_order_matters_where_one_piece_rescales_what_the_other_added():
    model = tiny("llama")
    scale = randomise(inlay.attach(model, inlay.IA3(sites="attn.v"), name="scale"), 1)
    low = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.v"), name="low"), 2)
    inlay.use(model, ("scale", "low"))
    y = logits(model)
    with pytest.raises(MergeError, match="act before"):
        low.merge()
    scale.merge()
    low.merge()
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


def test_a_piece_relative_to_the_frozen_weights_is_not_used_beside_a_merge_into_them():
    model = tiny("llama")
    low = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q"), name="low"), 1)
    randomise(inlay.attach(model, inlay.DoRA(rank=2, sites="attn.q"), name="dora"), 2)
    inlay.use(model, "low")
    low.merge()
    with pytest.raises(AdapterError, match="merged adapter"):
        inlay.use(model, ("low", "dora"))
    low.unmerge()
    inlay.use(model, ("low", "dora"))
    inlay.use(model, "low")
    low.merge()
    inlay.attach(model, inlay.DoRA(rank=2, sites="attn.k"), name="later")
    inlay.detach(model, "later")
    inlay.attach(model, inlay.DoRA(rank=2, sites="attn.q"), name="built_on_merged")
    with pytest.raises(MergeError, match="built from the merged"):
        low.unmerge()
    inlay.detach(model)


def test_new_biases_are_registered_and_removed():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.BitFit(sites="attn.q", add_missing=True))
    randomise(adapter)
    y = logits(model)
    adapter.merge()
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    adapter.unmerge()
    assert model.model.layers[0].self_attn.q_proj.bias is None
    adapter.detach()
    adapter = inlay.attach(model, inlay.BitFit(sites="norm", add_missing=True))
    with pytest.raises(MergeError, match="no place for a bias"):
        adapter.merge()


class Twice(nn.Linear):
    """Applies its weight in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """Applies its weight as nn.Linear does, in its own words."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def test_unknown_modules_are_tried_out():
    for cls, fits in ((Twice, False), (Renamed, True)):
        model = nn.Sequential(nn.Linear(4, 4), cls(4, 3))
        adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="1"), example={"input": torch.randn(2, 4)}))
        x = torch.randn(5, 4)
        y = model(x)
        if fits:
            adapter.merge()
            torch.testing.assert_close(model(x), y)
        else:
            with pytest.raises(MergeError, match="does not apply its weight"):
                adapter.merge()


@pytest.mark.parametrize("scaled", [False, True])
def test_embeddings_that_scale_their_rows(scaled):
    model = tiny("bart", scale_embedding=scaled)
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="embed")))
    y = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


def quantised(double: bool = True) -> nn.Module:
    return quantize(tiny("llama", hidden_size=64, intermediate_size=64), inlay.NF4(double_quant=double))


def test_a_quantised_base_asks_how():
    model = quantised()
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")))
    with pytest.raises(MergeError, match=r'to="bf16".*requantise=True'):
        adapter.merge()
    with pytest.raises(MergeError, match="choose one"):
        adapter.merge(to="bf16", requantise=True)
    with pytest.raises(MergeError, match="bf61"):
        adapter.merge(to="bf61")
    plain = inlay.attach(tiny("llama"), inlay.LoRA(rank=2))
    with pytest.raises(MergeError, match="for quantised modules"):
        plain.merge(to="bf16")


@pytest.mark.parametrize("to", ["fp32", "bf16"])
def test_a_quantised_base_merges_into_a_dense_copy(to):
    model = quantised()
    layer = model.model.layers[0].self_attn.q_proj
    cls, packed, keys = type(layer), layer.weight, list(model.state_dict())
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")))
    y = logits(model)
    report = adapter.merge(to=to)
    assert isinstance(layer, DenseLinear)
    assert not isinstance(layer, cls)
    limit = 1e-5 if to == "fp32" else 0.1
    torch.testing.assert_close(logits(model), y, atol=limit, rtol=limit)
    assert report.ratio < (1e-5 if to == "fp32" else 0.05)
    adapter.unmerge()
    assert layer.weight is packed
    assert torch.equal(logits(model), y)
    adapter.detach()
    assert type(layer) is cls
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("double", [False, True])
def test_requantising_measures_and_prints_the_damage(double, capsys):
    model = quantised(double)
    layer = model.model.layers[0].self_attn.q_proj
    packed, scales = layer.weight, layer.absmax
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q")), size=0.02)
    weight = weight_of(layer).float()
    delta = adapter.pieces["model.layers.0.self_attn.q_proj.lora"].weight_delta().detach()
    y = logits(model)
    report = adapter.merge(requantise=True)
    assert "‖ΔW‖" in capsys.readouterr().out
    stored = weight_of(layer).float()
    error = (stored - weight - delta).norm() / delta.norm()
    assert report.damages[0].ratio == pytest.approx(float(error), rel=1e-3)
    assert report.ratio > 0.1, "four bits cannot hold a small update"
    assert not torch.equal(logits(model), y)
    adapter.unmerge()
    assert layer.weight is packed
    assert layer.absmax is scales
    assert torch.equal(logits(model), y)


def test_a_quantised_base_with_trained_biases_only_needs_no_choice():
    model = quantize(tiny("bert", hidden_size=64, intermediate_size=64))
    adapter = randomise(inlay.attach(model, inlay.BitFit(), head=None))
    y = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)


def test_bitsandbytes_layers(capsys):
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32))
    model[0].load_state_dict(linear.state_dict())
    model = model.to("cpu")
    x = torch.randn(3, 64)
    model(x)
    adapter = randomise(inlay.attach(model, inlay.LoRA(rank=2, sites="0"), example={"input": x}))
    weight, packed = weight_of(model[0]).float(), model[0].weight
    delta = adapter.pieces["0.lora"].weight_delta().detach()
    adapter.merge(to="fp32")
    torch.testing.assert_close(model(x), x @ (weight + delta).T, atol=1e-5, rtol=1e-5)
    adapter.unmerge()
    assert model[0].weight is packed
    report = adapter.merge(requantise=True)
    stored = weight_of(model[0]).float()
    assert report.damages[0].error == pytest.approx(float((stored - weight - delta).norm()), rel=1e-3)
    torch.testing.assert_close(model(x), x @ stored.T, atol=1e-2, rtol=1e-2)
    adapter.unmerge()
    assert model[0].weight is packed
    assert torch.equal(weight_of(model[0]).float(), weight)


def test_an_adapter_that_another_needs_in_the_weights_is_not_taken_out_from_under_it():
    """IA3 merged behind LoRA scales what the LoRA in the weights reads; alone in the weights it would not."""
    model = tiny("llama")
    a, b = inlay.attach(model, inlay.LoRA(rank=2), "a"), inlay.attach(model, inlay.IA3(), "b")
    randomise(a)
    randomise(b, seed=5)
    inlay.use(model, ("a", "b"))
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    a.merge()
    b.merge()
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"Unmerge \['b'\] first"):
        a.unmerge()
    assert a.merged
    assert b.merged
    assert all(torch.equal(value, merged[key]) for key, value in model.state_dict().items())
    b.unmerge()
    a.unmerge()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
