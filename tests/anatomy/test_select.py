"""Selectors: every semantic name, stacks, layers, taps, paths, globs, and what the errors say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay.anatomy.base import SEMANTIC
from inlay.errors import SiteError
from tiny import tiny

BART = inlay.anatomy(tiny("bart", "cls"))
LLAMA = inlay.anatomy(tiny("llama"))


def ends(sites):
    return {s.leave.rsplit(".", 1)[-1] for s in sites}


def test_every_semantic_name_matches_somewhere():
    gated = inlay.anatomy(tiny("llama"))
    assert not [name for name in SEMANTIC if not (BART.has(name) or gated.has(name))]


def test_stack_and_layer_filters():
    assert len(BART.select("attn.q")) == 4
    assert {s.stack for s in BART.select("decoder:attn.q")} == {"decoder"}
    assert [s.leave for s in BART.select("encoder:ffn.up", layers=[-1])] == ["model.encoder.layers.1.fc1"]
    assert {s.stack for s in BART.select("decoder:q_proj")} == {"decoder"}
    with pytest.raises(SiteError, match=r"layers \[2\] do not exist.*2 encoder layers"):
        BART.select("attn.q", layers=[2])


def test_input_taps_act_on_what_enters_the_last_projection():
    site = LLAMA.select("ffn.down:input")[0]
    assert (site.tap, site.in_features, site.out_features) == ("input", 48, 48)
    span = LLAMA.select("ffn:input")[0]
    assert (span.enter, span.leave) == ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    assert (span.in_features, span.out_features) == (32, 48)


def test_spans_run_between_their_ends():
    site = BART.select("cross", layers=[0])[0]
    assert site.enter.endswith("encoder_attn.q_proj")
    assert site.leave.endswith("encoder_attn.out_proj")
    residual = LLAMA.select("ffn.residual")[0]
    assert residual.enter == "model.layers.0.post_attention_layernorm"
    norm = inlay.anatomy(tiny("bert")).select("ffn.norm")[0]
    assert (norm.tap, norm.enter, norm.leave) == ("through", norm.leave, "bert.encoder.layer.0.output.LayerNorm")


def test_paths_globs_and_whole_modules():
    assert ends(LLAMA.select("q_proj")) == {"q_proj"}
    assert len(LLAMA.select("*.layers.0.*_proj")) == 7
    assert [s.leave for s in LLAMA.select("mlp")] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert len(LLAMA.select(["attn.q", "q_proj"])) == 2, "one site, however often it is named"


@pytest.mark.parametrize(
    ("selector", "said"),
    [("qproj", "'q_proj'"), ("atn.q", "attn.q"), ("cross.q", "no such place"), ("gate_porj", "'gate_proj'")],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(selector, said):
    with pytest.raises(SiteError, match="matches n") as caught:
        LLAMA.select(selector)
    assert said in str(caught.value)


def test_a_kind_that_a_method_does_not_take_is_named():
    with pytest.raises(SiteError, match="norm module, and this method takes"):
        LLAMA.select("input_layernorm", kinds=("linear", "embedding"))


@given(st.lists(st.sampled_from(SEMANTIC), min_size=1, max_size=5))
def test_selection_does_not_depend_on_the_order_of_selectors(names):
    present = [n for n in names if BART.has(n)]
    if present:
        once, turned = BART.select(present), BART.select(present[::-1])
        key = [(s.leave, s.enter, s.tap, s.columns) for s in once]
        assert sorted(map(str, key)) == sorted(str((s.leave, s.enter, s.tap, s.columns)) for s in turned)
        assert len(set(key)) == len(key)
