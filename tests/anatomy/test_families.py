"""What the run finds in families whose structure is known from their papers and code."""

from __future__ import annotations

import pytest
import torch

import inlay
from architectures import made
from inlay.errors import SiteError
from tiny import FAMILIES, batch, tiny


def leaves(ports):
    return [p.leaf.rsplit(".", 1)[-1] for p in ports]


def parts(attention):
    return leaves(attention.q), leaves(attention.k), leaves(attention.v), attention.o.rsplit(".", 1)[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_attention_and_a_feed_forward_span_in_each_block(family):
    found = inlay.anatomy(tiny(family))
    assert found.problem is None
    for block in found.blocks:
        own = [a for a in block.attentions if not a.cross]
        assert len(own) == 1
        assert own[0].q
        assert own[0].k
        assert own[0].v
        assert own[0].o
        assert len(block.ffns) == 1
        assert not block.ffns[0].whole


def test_llama_with_grouped_keys_and_a_gate():
    found = inlay.anatomy(tiny("llama"))
    (first, second), heads = found.blocks, found.blocks[0].attentions[0].heads
    assert [b.path for b in (first, second)] == ["model.layers.0", "model.layers.1"]
    assert parts(first.attentions[0]) == (["q_proj"], ["k_proj"], ["v_proj"], "o_proj")
    assert (heads.query, heads.kv, heads.key_size, heads.causal) == (4, 2, 8, True)
    ffn = first.ffn
    assert [p.rsplit(".", 1)[-1] for p in (ffn.up, ffn.gate, ffn.down)] == ["up_proj", "gate_proj", "down_proj"]
    assert ffn.pre_norm == "model.layers.0.post_attention_layernorm"
    assert (ffn.post_norm, first.attentions[0].post_norm) == (None, None)
    assert first.attentions[0].pre_norm == "model.layers.0.input_layernorm"
    assert (found.output, found.embed) == ("lm_head", ("model.embed_tokens",))


def test_bert_ends_its_sublayers_with_norms():
    block = inlay.anatomy(tiny("bert")).blocks[0]
    assert block.attentions[0].post_norm == "bert.encoder.layer.0.attention.output.LayerNorm"
    assert block.ffn.post_norm == "bert.encoder.layer.0.output.LayerNorm"
    assert (block.attentions[0].pre_norm, block.ffn.pre_norm) == (None, None)
    assert block.attentions[0].o_end.endswith("attention.output.dropout")
    assert not block.causal


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_and_decoder_with_cross_attention(family):
    found = inlay.anatomy(tiny(family))
    assert [(b.stack, b.layer, [a.cross for a in b.attentions]) for b in found.blocks] == [
        ("encoder", 0, [False]),
        ("encoder", 1, [False]),
        ("decoder", 0, [False, True]),
        ("decoder", 1, [False, True]),
    ]
    assert [b.causal for b in found.blocks] == [False, False, True, True]


def test_gpt2_holds_q_k_v_side_by_side():
    attention = inlay.anatomy(tiny("gpt2")).blocks[0].attentions[0]
    assert [port.columns for (port,) in (attention.q, attention.k, attention.v)] == [
        ((0, 32),), ((32, 64),), ((64, 96),)
    ]  # fmt: skip


def test_gpt_neox_interleaves_q_k_v_by_head():
    attention = inlay.anatomy(tiny("gpt_neox")).blocks[0].attentions[0]
    assert attention.q[0].columns == ((0, 8), (24, 32), (48, 56), (72, 80))
    assert attention.v[0].columns == ((16, 24), (40, 48), (64, 72), (88, 96))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_lora_on_the_queries_of_a_fused_projection_moves_only_them(family):
    """By value: what reaches the attention function as k and v keeps its bits, q does not."""
    from transformers import AttentionInterface

    model, seen = tiny(family), []

    def look(module, q, k, v, mask, **kwargs):
        seen.append((q, k, v))
        return torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    AttentionInterface.register("look", look)
    inputs = batch(model, padding="none", labels=False)
    try:
        model.set_attn_implementation("look")
        with torch.no_grad():
            model(**inputs)
            adapter = inlay.attach(model, inlay.LoRA(rank=2, sites="attn.q"))
            for name, parameter in adapter.named_parameters():
                parameter.normal_() if name.endswith("B") else None
            before = seen.pop(0)
            seen.clear()
            model(**inputs)
    finally:
        AttentionInterface._global_mapping.pop("look", None)
    q, k, v = seen[0]
    assert not torch.equal(q, before[0])
    assert (q - before[0]).abs().amax((0, 2, 3)).min() > 0, "every head's queries move"
    assert torch.equal(k, before[1])
    assert torch.equal(v, before[2])


def test_albert_shares_one_block():
    found = inlay.anatomy(made("albert"))
    (block,) = found.blocks
    assert parts(block.attentions[0]) == (["query"], ["key"], ["value"], "dense")
    assert (block.ffn.up.rsplit(".", 1)[-1], block.ffn.down.rsplit(".", 1)[-1]) == ("ffn", "ffn_output")
    assert found.new_head
    assert found.head == ("classifier",)


def test_models_that_compute_their_own_softmax_are_told_by_structure():
    for name, ports in (
        ("deberta_v2", (["query_proj"], ["key_proj"], ["value_proj"], "dense")),
        ("gptj", (["q_proj"], ["k_proj"], ["v_proj"], "out_proj")),
    ):
        attention = inlay.anatomy(made(name)).blocks[0].attentions[0]
        assert attention.form == "softmax"
        assert parts(attention) == ports
        assert (attention.heads.query, attention.heads.key_size) == (4, 8)
        assert attention.heads.causal == (name == "gptj")


def test_bloom_interleaves_and_masks_by_itself():
    attention = inlay.anatomy(made("bloom")).blocks[0].attentions[0]
    assert (attention.form, attention.heads.causal) == ("softmax", True)
    assert attention.k[0].columns == ((8, 16), (32, 40), (56, 64), (80, 88))


def test_gptj_runs_attention_and_feed_forward_side_by_side():
    block = inlay.anatomy(made("gptj")).blocks[0]
    assert block.attentions[0].pre_norm == block.ffn.pre_norm == "transformer.h.0.ln_1"


def test_mixtral_takes_its_experts_as_one_span():
    found = inlay.anatomy(made("mixtral"))
    (site,) = found.select("ffn", layers=[0])
    assert (site.leave, site.in_features, site.out_features) == ("model.layers.0.mlp", 32, 32)
    assert not any("experts" in s.leave for s in found.select("linear"))
    assert any("experts in one tensor" in note for note in found.notes)
    with pytest.raises(SiteError, match="4 experts in one three-dimensional weight"):
        inlay.attach(made("mixtral"), inlay.LoRA(sites="mlp.experts"))


def test_deepseek_reads_its_latents():
    dense, experts = inlay.anatomy(made("deepseek_v3")).blocks
    attention = dense.attentions[0]
    assert parts(attention) == (["q_b_proj"], ["kv_a_proj_with_mqa", "kv_b_proj"], ["kv_b_proj"], "o_proj")
    assert attention.k[0].columns == ((10, 18),), "the rotated key behind the latent"
    assert attention.enter.endswith("q_a_proj")
    assert (attention.heads.key_size, attention.heads.value_size) == (14, 7)
    assert (dense.ffn.whole, experts.ffn.whole) == (False, True)


def test_mamba_has_one_sublayer_that_does_both_jobs():
    found = inlay.anatomy(made("mamba"))
    assert [m.path for b in found.blocks for m in b.mixers] == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    assert {s.leave for s in found.select(["attn", "ffn"])} == {m.path for b in found.blocks for m in b.mixers}
    assert any("mixer.dt_proj" in note for note in found.notes)
    assert not any(s.leave.endswith("dt_proj") for s in found.select("linear"))
    with pytest.raises(SiteError, match="matches nothing"):
        found.select("heads")
    with pytest.raises(SiteError, match="never called"):
        found.select("dt_proj")


def test_xlm_keeps_attentions_and_feed_forward_layers_in_two_lists():
    found = inlay.anatomy(made("xlm"))
    assert {s.layer for s in found.select("attn.q")} == {s.layer for s in found.select("ffn")} == {0, 1}
    assert len(found.select("linear", layers=[0])) == 6
