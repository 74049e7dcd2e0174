"""Extra keys at every attention: the traps of that route, mixed batches, generation, and what must be refused."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import inlay
from attention_oracle import Extras, features, run, shake, without_adapters
from inlay.errors import AttachmentError, SiteError
from inlay.methods.base import ExtraKV, Method
from tiny import FAMILIES, VOCAB, batch, tiny


def prefixed(model, name="p", seed=3, **settings):
    adapter = inlay.attach(model, inlay.Prefix(**({"length": 3} | settings)), name=name, head=None)
    shake(adapter, seed)
    return adapter


def extras(model, adapter):
    """The adapter's prefixes, for the oracle."""
    found = {}
    for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
        k, v = piece(torch.zeros(1, 1, 1))
        found[site.leave] = Extras(k.detach(), v.detach())
    return found


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_no_real_token_is_cropped_and_no_padding_is_seen(attn, padding):
    """Traps 1 and 2: without padding SDPA gets no mask and would crop keys; with padding its mask must reach it."""
    model = tiny("llama", attn=attn)
    adapter = prefixed(model)
    inputs = features(model, padding=padding)
    real = inputs["attention_mask"].bool()
    expected = run(without_adapters(model), extras(model, adapter), inputs)
    torch.testing.assert_close(logits(model, inputs)[real], expected[real], rtol=1e-5, atol=1e-5)


def test_a_padded_row_equals_the_row_without_padding():
    model = tiny("llama")
    prefixed(model)
    inputs = features(model, padding="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = logits(model, inputs | {"position_ids": positions})
    for row in range(len(ids)):
        alone = logits(model, {"input_ids": ids[row][mask[row].bool()][None]})
        torch.testing.assert_close(padded[row][mask[row].bool()], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("later", ["sdpa", "eager"])
def test_a_later_choice_of_attention_function_is_obeyed_and_keeps_the_prefix(later):
    """Trap 3: the choice must not silently drop the extra keys."""
    model = tiny("llama", attn="eager" if later == "sdpa" else "sdpa")
    prefixed(model)
    inputs = features(model)
    before = logits(model, inputs)
    model.set_attn_implementation(later)
    assert model.config._attn_implementation == later
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-5, atol=1e-5)
    inlay.detach(model)
    assert model.config._attn_implementation == later
    assert not torch.allclose(logits(model, inputs), before, atol=1e-2)


def test_a_function_that_cannot_take_the_keys_is_refused_at_attaching_and_later():
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(AttachmentError, match=r"'flex_attention'.*set_attn_implementation\(\"sdpa\"\)"):
        prefixed(model)
    assert type(model.model.layers[0].self_attn) is LlamaAttention
    model.set_attn_implementation("sdpa")
    prefixed(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(AttachmentError, match="'flash_attention_2'"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
        )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_relative_positions_and_cross_attention(family, attn):
    """Trap 4: T5's position bias is extended by zeros; encoder, decoder and cross-attention each have a prefix."""
    model = tiny(family, attn=attn)
    adapter = prefixed(model)
    assert {s.name for s in adapter.sites} == {"heads", "cross.heads"}
    assert {s.stack for s in adapter.sites} == {"encoder", "decoder"}
    inputs = features(model)
    expected = run(without_adapters(model), extras(model, adapter), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma2"])
def test_the_prefix_of_real_words_stands_for_the_words_and_shifts_no_position(family):
    """Trap 5: with positions shifted by hand, a prefix of the words' keys equals the words themselves."""
    model = gemma2() if family == "gemma2" else tiny(family)
    words, text = torch.randint(5, VOCAB, (1, 4)), torch.randint(5, VOCAB, (1, 6))
    whole = logits(model, {"input_ids": torch.cat([words, text], 1)})[:, 4:]
    adapter = inlay.attach(model, inlay.Prefix(length=4), head=None)
    assert inlay.init_prefix_from_words(adapter, words[0]) == 0.0
    shifted = logits(model, {"input_ids": text, "position_ids": torch.arange(4, 10)[None]})
    torch.testing.assert_close(shifted, whole, rtol=1e-4, atol=1e-4)
    unshifted = logits(model, {"input_ids": text, "position_ids": torch.arange(6)[None]})
    torch.testing.assert_close(logits(model, {"input_ids": text}), unshifted)
    assert not torch.allclose(unshifted, whole, atol=1e-2)


def gemma2():
    """A model whose scores are capped (softcap), which only its eager attention can do."""
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, attn_logit_softcapping=1.5, query_pre_attn_scalar=1, initializer_range=0.15,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixed_batch_equal_the_rows_alone(family, attn):
    model = tiny(family, attn=attn)
    inputs = features(model, rows=5)
    base = logits(model, inputs)
    prefixed(model, "a", 1)
    prefixed(model, "b", 2, length=5)
    rows = ["b", None, ("a", "b"), "a", "b"]
    with inlay.use(model, rows):
        mixed = logits(model, inputs)
    for i, names in enumerate(rows):
        with inlay.use(model, names):
            torch.testing.assert_close(mixed[i], logits(model, inputs)[i], rtol=1e-5, atol=1e-5, msg=f"row {i}")
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)
    with inlay.use(model, ("b", "a")):  # softmax does not know the order of keys
        torch.testing.assert_close(logits(model, inputs)[2], mixed[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_models_without_active_prefix_keep_their_bits(family, padding):
    model = tiny(family)
    inputs = features(model, padding=padding)
    base = logits(model, inputs)
    adapter = prefixed(model)
    module = dict(model.named_modules())[adapter.sites[0].leave]
    with inlay.use(model, None):
        assert torch.equal(logits(model, inputs), base)
        assert module.config is module.__dict__["config"]
    inlay.detach(model)
    assert torch.equal(logits(model, inputs), base)


@given(data=st.data())
def test_any_route_over_any_prefixes(data):
    model = MIXED[0]
    names = [None, "a", "b", "c"]
    entry = st.one_of(st.sampled_from(names), st.lists(st.sampled_from(names[1:]), unique=True, min_size=1).map(tuple))
    rows = data.draw(st.lists(entry, min_size=1, max_size=6))
    inputs = features(model, rows=len(rows), seed=data.draw(st.integers(0, 99)), padding=data.draw(st.sampled_from(
        ["none", "left", "right"])))  # fmt: skip
    real = inputs["attention_mask"].bool()
    with inlay.use(model, rows):
        mixed = logits(model, inputs)
    for i, own in enumerate(rows):
        with inlay.use(model, own):
            alone = logits(model, {k: v[i : i + 1] for k, v in inputs.items()})
        torch.testing.assert_close(mixed[i][real[i]], alone[0][real[i]], rtol=1e-4, atol=1e-5)


def _mixed():
    model = tiny("mistral")
    for seed, (name, length) in enumerate({"a": 1, "b": 4, "c": 7}.items()):
        prefixed(model, name, seed, length=length)
    return model


MIXED = [_mixed()]


def test_gradients_of_a_mixed_batch_reach_only_the_rows_own_prefix():
    model = tiny("llama")
    a, b = prefixed(model, "a", 1), prefixed(model, "b", 2, length=5)
    inputs = features(model, rows=4)
    with inlay.use(model, ["a", "b", None, "a"]):
        model(**inputs).logits[[0, 2, 3]].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in b.parameters())
    mixed = [p.grad.clone() for p in a.parameters()]
    for p in a.parameters():
        p.grad = None
    with inlay.use(model, "a"):
        model(**inputs).logits[[0, 3]].square().sum().backward()
    for got, p in zip(mixed, a.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-4)


LENGTHS = {"max_new_tokens": 5, "min_new_tokens": 5, "suppress_tokens": [0]}
GENERATE = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "t5", "bart"])
@pytest.mark.parametrize("how", GENERATE)
def test_generate_with_cache_equals_without_and_rows_equal_rows_alone(family, how):
    model = tiny(family)
    prefixed(model, "a", 1)
    prefixed(model, "b", 2, length=6)
    inputs = batch(model, padding="left", labels=False)
    rows = ["a", None, "b"]

    def generate(names, chosen=slice(None), **options):
        torch.manual_seed(5)
        own = {k: v[chosen] for k, v in inputs.items()}
        with inlay.use(model, names):
            return model.generate(
                **own, max_new_tokens=5, min_new_tokens=5, suppress_tokens=[0], **(GENERATE[how] | options)
            )

    cached = generate(rows)
    assert torch.equal(cached, generate(rows, use_cache=False))
    assert not torch.equal(cached, generate(None))
    if how != "sampling":  # which draws numbers for all rows together
        for i, name in enumerate(rows):
            assert torch.equal(cached[i], generate(name, slice(i, i + 1))[0])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_static_cache_whose_prefill_has_more_keys_than_queries(padding):
    model = tiny("llama")
    prefixed(model)
    inputs = batch(model, padding=padding, labels=False)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    static = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(plain, static)


def test_sliding_windows_never_hide_the_prefix():
    model = tiny("mistral", sliding_window=3)
    adapter = prefixed(model, layers=(0,))
    inputs = features(model, rows=1, length=12, padding="none")
    expected = run(without_adapters(model), extras(model, adapter), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    with inlay.use(model, None):
        base = logits(model, inputs)
    assert (logits(model, inputs) - base)[0, -1].abs().max() > 1e-2
    cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))


class GatedKV(ExtraKV):
    """Keys and values with a gate for each token."""

    def __init__(self, site, row):
        super().__init__()
        h = site.heads
        self.k = nn.Parameter(torch.randn(1, h.kv, 3, h.key_size))
        self.v = nn.Parameter(torch.randn(1, h.kv, 3, h.value_size))
        self.row = row

    def forward(self, x):
        g = torch.sigmoid(x.mean(-1, keepdim=True))
        return self.k, self.v, g.mean(1, keepdim=True) if self.row else g


class Gated(Method):
    """A method of the test only."""

    tag: ClassVar[str] = "gated_test"
    row: bool = False

    def select(self, anatomy):
        return anatomy.select("heads", (0,))

    def build(self, site, frozen, shared):
        return GatedKV(site, self.row)


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_gate_for_each_query_scales_keys_and_values(family, attn, row):
    model = tiny(family, attn=attn)
    adapter = inlay.attach(model, Gated(row=row), head=None)
    (site,), (piece,) = adapter.sites, adapter.pieces.values()
    inputs = features(model)
    seen = []
    handle = piece.register_forward_hook(lambda _, args, out: seen.append(out[2]))
    got = logits(model, inputs)
    handle.remove()
    oracle = {site.leave: Extras(piece.k.detach(), piece.v.detach(), gate=seen[0])}
    torch.testing.assert_close(got, run(without_adapters(model), oracle, inputs), rtol=1e-5, atol=1e-5)
    prefixed(model, "other", layers=(0,))
    with inlay.use(model, ("default", "other")):
        both = logits(model, inputs)
    with inlay.use(model, ("other", "default")):
        torch.testing.assert_close(logits(model, inputs), both, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both, got, atol=1e-3)


def test_attention_weights_show_the_prefix_in_front():
    model = tiny("llama", attn="eager")
    prefixed(model, "a")
    prefixed(model, "b", length=5)
    inputs = features(model)
    weights = model(**inputs, output_attentions=True).attentions
    assert weights[0].shape[-1] == inputs["input_ids"].shape[1] + 5
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(weights[0].shape[:-1]))
    with inlay.use(model, ["a", "b", None]):
        mixed = model(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(mixed[0][1], weights[0][1])
    assert not mixed[0][0, ..., :2].any()
    assert not mixed[0][2, ..., :5].any()
    torch.testing.assert_close(mixed[0].sum(-1), torch.ones(weights[0].shape[:-1]))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_compiles_in_one_graph_and_sees_a_later_prefix(family):
    torch._dynamo.reset()
    model = tiny(family, **{"num_layers" if family == "t5" else "num_hidden_layers": 1})
    prefixed(model, "a")
    inputs = features(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, logits(model, inputs))
        if family == "llama":
            prefixed(model, "b", length=5)
            with inlay.use(model, ["b", None, "a"]):
                torch.testing.assert_close(compiled(**inputs).logits, logits(model, inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
@pytest.mark.parametrize("mid", [None, 6])
def test_gradient_checkpointing_gives_equal_gradients(family, mid):
    model = tiny(family).train()
    adapter = prefixed(model, mid=mid)
    inputs = batch(model)

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in adapter.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert all(g.any() for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("mid", [None, 6])
def test_copies_and_pickles_are_of_their_own(mid):
    model = tiny("llama")
    adapter = prefixed(model, mid=mid)
    inputs = features(model)
    before = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), before)
        shake(inlay.adapters(twin)["p"])
        assert not torch.allclose(logits(twin, inputs), before, atol=1e-3)
    assert torch.equal(logits(model, inputs), before)
    shake(adapter)
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype):
    model = tiny("llama", dtype=dtype)
    adapter = prefixed(model)
    out = model(**features(model)).logits
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.any() for p in adapter.parameters())


def test_attention_by_windows_is_refused_by_name_when_attaching():
    config = transformers.LongformerConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        attention_window=[4], pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(AttachmentError, match="blocks"):
        prefixed(model)
    assert [type(m) for m in model.modules()] == classes


def test_gpt2_with_its_own_reordered_attention_is_refused():
    model = tiny("gpt2", attn="eager", reorder_and_upcast_attn=True)
    prefixed(model)
    with pytest.raises(AttachmentError, match="did not call transformers' attention function"):
        model(**features(model))
    model.set_attn_implementation("sdpa")
    model(**features(model))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_module_that_compares_the_name_of_its_function_goes_its_usual_way(attn):
    """DeepSeek's sparse attention masks keys by its indexer under these two names and hands indices on under others."""
    config = transformers.DeepseekV32Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16, index_topk=3,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    adapter = prefixed(model)
    inputs = features(model, padding="none")
    expected = run(without_adapters(model), extras(model, adapter), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)


class Odd(LlamaAttention):
    """An attention that can skip its function, call it twice, or pass it something unknown."""

    how = "normal"

    def forward(self, hidden_states, *args, **kwargs):
        if self.how == "skips":
            return torch.zeros_like(hidden_states), None
        if self.how == "twice":
            super().forward(hidden_states, *args, **kwargs)
        if self.how == "passes":
            kwargs["attention_bias"] = torch.zeros(1)
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("how", "message"), [("skips", "did not call"), ("twice", "more than once"), ("passes", "'attention_bias'")]
)
def test_extra_keys_are_never_ignored_silently(how, message):
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Odd
    prefixed(model)
    Odd.how = how
    try:
        with pytest.raises(AttachmentError, match=message):
            model(**features(model))
    finally:
        Odd.how = "normal"
    model(**features(model))


def test_a_piece_of_another_shape_is_refused():
    model = tiny("llama")
    adapter = prefixed(model)
    piece = next(iter(adapter.pieces.values()))
    piece.heads, piece.key_size, piece.value_size = 4, 4, 4
    with pytest.raises(SiteError, match="2 key/value heads of size 8, but a piece gave 4 of size 4"):
        model(**features(model))
