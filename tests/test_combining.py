"""Combined adapters against dense sums, and against PEFT."""

from __future__ import annotations

import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import inlay
from comparing import logits, randomise
from inlay.combining import combine
from inlay.errors import AdapterError, MergeError
from tiny import batch, tiny


def two(family: str = "llama", a: inlay.Method | None = None, b: inlay.Method | None = None) -> nn.Module:
    model = tiny(family)
    randomise(inlay.attach(model, a or inlay.LoRA(rank=2, sites="attn.q"), "a"), 1)
    randomise(inlay.attach(model, b or inlay.LoRA(rank=3, alpha=5, sites=("attn.q", "attn.v")), "b"), 2)
    return model


def deltas(adapter: inlay.Adapter) -> dict[tuple[str, object], Tensor]:
    """ΔW of each place, dense."""
    found: dict[tuple[str, object], Tensor] = {}
    for piece, site in zip(adapter.pieces.values(), adapter.sites, strict=True):
        key = site.leave, site.columns
        found[key] = found.get(key, 0) + piece.weight_delta().detach()
    return found


def wanted(model: nn.Module, weights: dict[str, float]) -> dict[tuple[str, object], Tensor]:
    total: dict[tuple[str, object], Tensor] = {}
    for name, weight in weights.items():
        for place, delta in deltas(inlay.adapters(model)[name]).items():
            total[place] = total.get(place, 0) + weight * delta
    return total


@hypothesis.settings(max_examples=5)
@hypothesis.given(st.floats(-2, 2), st.floats(-2, 2))
def test_concatenated_ranks_are_exact(first, second):
    model = two()
    weights = {"a": first, "b": second}
    adapter, report = combine(model, weights, "ab")
    for place, delta in wanted(model, weights).items():
        torch.testing.assert_close(deltas(adapter)[place], delta, atol=1e-6, rtol=1e-5)
    assert report.ratio == 0
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 5
    assert report.ranks["model.layers.1.self_attn.v_proj"] == 3


@pytest.mark.parametrize(
    ("family", "a", "b"),
    [
        ("gpt2", inlay.LoRA(rank=2, sites="attn.q"), inlay.LoRA(rank=3, sites=("attn.q", "attn.v", "ffn.up"))),
        ("gpt2", inlay.LoRA(rank=2, sites="attn.q", layers=(0,)), inlay.LoRA(rank=2, sites="c_attn")),
        ("bart", inlay.LoRA(rank=2, sites=("cross.q", "embed")), inlay.LoRA(rank=1, rslora=True, sites="linear")),
        ("llama", inlay.AdaLoRA(init_rank=3, target_rank=2), inlay.LoRA(rank=2, sites=("attn.q", "embed"))),
        ("t5", inlay.LoRA(rank={"attn.q": 1, "default": 2}), inlay.LoRA(rank=2) + inlay.LoRA(rank=1, sites="ffn.up")),
    ],
)
def test_sites_of_any_kind_and_the_model_computes_the_sum(family, a, b):
    model = two(family, a, b)
    weights = {"a": 0.6, "b": -0.4}
    adapter, _ = combine(model, weights, "ab")
    for place, delta in wanted(model, weights).items():
        torch.testing.assert_close(deltas(adapter)[place], delta, atol=1e-5, rtol=1e-4)
    alone = logits(model)
    assert adapter.trained_parameters > 0
    adapter.merge()
    torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5, 7, None])
def test_svd_is_the_best_approximation_and_its_error_is_reported(rank):
    model = two()
    weights = {"a": 1.0, "b": -1.0}
    adapter, report = combine(model, weights, "ab", "svd", rank)
    kept = rank or 3
    for (path, columns), delta in wanted(model, weights).items():
        values = torch.linalg.svdvals(delta.double())
        error = (deltas(adapter)[path, columns] - delta).norm()
        assert float(error) == pytest.approx(float(values[kept:].norm()), abs=1e-5)
        assert report.errors[path] == pytest.approx(float(error), abs=1e-5)
        assert report.sizes[path] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert (report.ratio > 1e-3) == (kept < 5)


def test_svd_takes_what_has_no_factors():
    model = two(a=inlay.DoRA(rank=2, sites="attn.q"), b=inlay.IA3(sites=("attn.q", "ffn.down:input")))
    dora, ia3 = inlay.adapters(model)["a"], inlay.adapters(model)["b"]
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    scale = ia3.pieces["model.layers.0.self_attn.q_proj.ia3"].l.detach()
    change = dora.pieces["model.layers.0.self_attn.q_proj.dora"].weight_delta().detach()
    adapter, report = combine(model, {"a": 1.0, "b": 1.0}, "ab", "svd", 32)
    expected = change + (scale[:, None] - 1) * weight
    torch.testing.assert_close(deltas(adapter)["model.layers.0.self_attn.q_proj", None], expected, atol=1e-5, rtol=1e-4)
    assert report.ratio < 1e-9
    with pytest.raises(MergeError, match=r"(?s)a: model\.layers\.0.*DoRADelta.*how='svd'.*ScaleDelta"):
        combine(model, {"a": 1.0, "b": 1.0}, "again")
    assert "again" not in inlay.adapters(model)


def test_linear_adds_factors_and_reports_the_cross_terms():
    model = two(b=inlay.LoRA(rank=2, sites="attn.q"))
    weights = {"a": 0.5, "b": 0.5}
    adapter, report = combine(model, weights, "ab", "linear")
    path = "model.layers.0.self_attn.q_proj"
    delta = wanted(model, weights)[path, None]
    error = (deltas(adapter)[path, None] - delta).norm()
    assert report.errors[path] == pytest.approx(float(error), rel=1e-4)
    assert report.ratio > 0.1
    assert f"{report.ratio:.2%}" in str(report)
    with pytest.raises(MergeError, match="ranks are"):
        combine(two(), weights, "ab", "linear")


@pytest.mark.parametrize("how", ["concat", "svd", "linear"])
def test_peft_combines_to_the_same(how):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tiny("llama")
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]), "a")
        theirs.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
        generator = torch.Generator().manual_seed(0)
        model = tiny("llama")
        ours = {n: inlay.attach(model, inlay.LoRA(rank=2, alpha=3, sites="attn.q"), n) for n in "ab"}
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                    path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
                    ours[rest.split(".")[1]].pieces[f"{path}.lora"].get_parameter(rest[0]).copy_(parameter)
        kind = {"concat": "cat", "svd": "svd", "linear": "linear"}[how]
        theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "ab", kind, svd_rank=2 if how == "svd" else None)
        theirs.set_adapter("ab")
    combine(model, {"a": 0.7, "b": 0.4}, "ab", how, 2 if how == "svd" else None)
    with torch.no_grad():
        expected = theirs(**batch(model)).logits
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_combined_is_refused_by_name():
    model = two(b=inlay.LoRA(rank=2) + inlay.Bottleneck(size=4))
    for how in ("concat", "svd"):
        with pytest.raises(MergeError, match=r"b: .*BottleneckDelta"):
            combine(model, {"a": 1, "b": 1}, "ab", how)
    with pytest.raises(AdapterError, match="'aa'"):
        combine(model, {"aa": 1}, "ab")
    with pytest.raises(AdapterError, match="at least one"):
        combine(model, {}, "ab")
    with pytest.raises(AdapterError, match="concat"):
        combine(model, {"a": 1}, "ab", "concatenate")
    with pytest.raises(AdapterError, match="how='svd'"):
        combine(model, {"a": 1}, "ab", rank=3)
    with pytest.raises(AdapterError, match="attached already"):
        combine(model, {"a": 1}, "b")
    assert list(inlay.adapters(model)) == ["a", "b"]


def test_heads_are_taken_from_one_adapter():
    model = two("bert", inlay.LoRA(rank=2), inlay.LoRA(rank=2))
    with pytest.raises(AdapterError, match="head='a'"):
        combine(model, {"a": 1.0, "b": 1.0}, "ab")
    with pytest.raises(AdapterError, match="none of the combined"):
        combine(model, {"a": 1.0, "b": 1.0}, "ab", head="c")
    adapter, _ = combine(model, {"a": 1.0, "b": 0.0}, "ab", head="a")
    combined = logits(model)
    inlay.use(model, "a")
    torch.testing.assert_close(logits(model), combined, atol=1e-5, rtol=1e-5)
    assert adapter.head_parameters > 0


def test_a_combined_adapter_is_saved_and_loaded(tmp_path):
    model = two("gpt2", inlay.LoRA(rank=2, sites="attn.q"), inlay.LoRA(rank=3, sites=("attn.q", "ffn.up")))
    adapter, _ = combine(model, {"a": 0.5, "b": 0.5}, "ab")
    y = logits(model)
    adapter.save(tmp_path / "native")
    adapter.save(tmp_path / "peft", format="peft")
    for format in ("native", "peft"):
        again = tiny("gpt2")
        inlay.load(again, tmp_path / format)
        torch.testing.assert_close(logits(again), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [{"a": float("nan")}, {"a": float("inf")}, {"a": "1"}, {"a": True}, ["a"], {}])
def test_weights_that_are_no_numbers_are_refused(weights):
    model = tiny("llama")
    inlay.attach(model, inlay.LoRA(rank=2), "a")
    with pytest.raises(AdapterError, match=r"weight"):
        inlay.combine(model, weights, "sum")
    assert set(inlay.adapters(model)) == {"a"}
