"""Bottleneck adapters against hand-written hooks in value and gradient, published counts, placements."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

import inlay
from inlay.errors import MethodError, SiteError
from tiny import batch, tiny


def randomise(adapter: inlay.Adapter) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def bottleneck(z, tensors, activation):
    """s f(z W_down^T + b) W_up^T + b, written without the library."""
    h = activation(z @ tensors["W_down"].T + tensors["b_down"])
    return h @ tensors["W_up"].T + tensors["b_up"]


def oracle(model, inputs, adapter, edits):
    """Runs a copy of the base with plain hooks; returns the logits and the tensors to compare gradients of."""
    plain = copy.deepcopy(model)
    inlay.detach(plain)
    modules = dict(plain.named_modules())
    tensors = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    handles = [hook for edit in edits for hook in edit(modules, tensors)]
    logits = plain(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits, tensors


def assert_same(model, inputs, adapter, edits):
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    logits, tensors = oracle(model, inputs, adapter, edits)
    got = model(**inputs).logits
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    (got * weight).sum().backward()
    pieces = [n for n, t in tensors.items() if ".bottleneck." in n]
    assert pieces
    for name, parameter in adapter.named_parameters():
        if name in pieces:
            torch.testing.assert_close(parameter.grad, tensors[name].grad, rtol=1e-4, atol=1e-4, msg=name)


def own(tensors, path):
    prefix = f"{path}.bottleneck."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def sequential(path, activation, scale=1.0):
    def edit(modules, tensors):
        t = own(tensors, path)
        return [
            modules[path].register_forward_hook(lambda m, a, y: y + scale * bottleneck(y, t, activation)),
        ]

    return edit


def parallel(enter, leave, activation, scale=1.0):
    def edit(modules, tensors):
        seen, t = [], own(tensors, leave)
        return [
            modules[enter].register_forward_pre_hook(lambda m, a: seen.append(a[0])),
            modules[leave].register_forward_hook(lambda m, a, y: y + scale * bottleneck(seen.pop(), t, activation)),
        ]

    return edit


BERT = "bert.encoder.layer.{}."


@pytest.mark.proves("oracle", "bottleneck")
def test_houlsby_is_sequential_after_both_sublayers_and_before_the_residual():
    model = tiny("bert")
    adapter = inlay.attach(model, inlay.Bottleneck.houlsby(6, train_norms=False), head=None)
    randomise(adapter)
    edits = [
        sequential(BERT.format(i) + part, F.gelu)
        for i in (0, 1)
        for part in ("attention.output.dropout", "output.dropout")
    ]
    assert_same(model, batch(model), adapter, edits)


def test_houlsby_trains_every_norm_and_leaves_the_base_norms_alone():
    model = tiny("bert")
    before = {n: p.clone() for n, p in model.named_parameters() if "LayerNorm" in n}
    adapter = inlay.attach(model, inlay.Bottleneck.houlsby(6))
    norms = {n for n, _ in adapter.named_parameters() if "LayerNorm" in n}
    assert len(norms) == 2 * (1 + 2 * 2)
    inputs = batch(model)
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapter.named_parameters() if n in norms)
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


@pytest.mark.proves("oracle", "bottleneck")
def test_pfeiffer_in_a_post_ln_block_runs_the_frozen_norm_twice():
    model = tiny("bert")
    adapter = inlay.attach(model, inlay.Bottleneck.pfeiffer(size=6), head=None)
    randomise(adapter)

    def edit_for(path):
        def edit(modules, tensors):
            t, norm = own(tensors, path), modules[path]

            def again(m, args, z):
                moved = args[0] + bottleneck(z, t, F.relu)
                return F.layer_norm(moved, z.shape[-1:], norm.weight, norm.bias, norm.eps)

            return [norm.register_forward_hook(again)]

        return edit

    assert [s.leave for s in adapter.sites] == [BERT.format(i) + "output.LayerNorm" for i in (0, 1)]
    assert_same(model, batch(model), adapter, [edit_for(s.leave) for s in adapter.sites])


def test_pfeiffer_in_a_pre_ln_block_reads_the_residual_stream():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.Bottleneck.pfeiffer(size=6))
    randomise(adapter)

    def edit_for(i):
        def edit(modules, tensors):
            layer = f"model.layers.{i}."
            seen, t = [], own(tensors, layer + "mlp.down_proj")
            return [
                modules[layer + "post_attention_layernorm"].register_forward_pre_hook(lambda m, a: seen.append(a[0])),
                modules[layer + "mlp.down_proj"].register_forward_hook(
                    lambda m, a, o: o + bottleneck(seen.pop() + o, t, F.relu)
                ),
            ]

        return edit

    assert_same(model, batch(model), adapter, [edit_for(0), edit_for(1)])


@pytest.mark.parametrize(
    ("family", "enter", "leave"),
    [
        ("llama", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
        ("gpt2", "transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.dropout"),
        ("bert", "bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dropout"),
        ("opt", "model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    ],
)
@pytest.mark.proves("oracle", "bottleneck")
def test_scaled_parallel_reads_the_input_of_the_span(family, enter, leave):
    model = tiny(family)
    adapter = inlay.attach(model, inlay.Bottleneck.scaled_parallel(6), head=None)
    randomise(adapter)
    edits = [parallel(enter.format(i), leave.format(i), F.relu, scale=4.0) for i in (0, 1)]
    assert_same(model, batch(model), adapter, edits)


def test_parallel_on_attention_before_the_output_projection():
    """jxhe's code adds it to the concatenated heads, so it passes W_o: the same as adding W_o Δ afterwards."""
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.Bottleneck.parallel(6, "attn:input"))
    randomise(adapter)

    def edit_for(i):
        def edit(modules, tensors):
            at = f"model.layers.{i}.self_attn."
            prefix = f"{at}o_proj.bottleneck_in."
            t = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            seen = []
            return [
                modules[at + "q_proj"].register_forward_pre_hook(lambda m, a: seen.append(a[0])),
                modules[at + "o_proj"].register_forward_pre_hook(
                    lambda m, a: (a[0] + bottleneck(seen.pop(), t, F.relu),)
                ),
            ]

        return edit

    logits, _ = oracle(
        model, {k: v for k, v in batch(model).items() if k != "labels"}, adapter, [edit_for(0), edit_for(1)]
    )
    inputs = {k: v for k, v in batch(model).items() if k != "labels"}
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-5, atol=1e-5)


def test_learned_scales_start_at_one_and_learn():
    for scale, size in (("learned", 1), ("channel", 32)):
        model = tiny("bert")
        adapter = inlay.attach(model, inlay.Bottleneck.parallel(6, scale=scale), head=None)
        randomise(adapter)
        scales = [p for n, p in adapter.named_parameters() if n.endswith(".s")]
        assert [s.numel() for s in scales] == [size, size]
        model(**batch(model)).loss.backward()
        assert all(s.grad.abs().sum() > 0 for s in scales)


def test_dropout_between_activation_and_up_projection_only_in_training():
    model = tiny("bert")
    adapter = inlay.attach(model, inlay.Bottleneck.parallel(16, dropout=0.5), head=None)
    randomise(adapter)
    inputs = {k: v for k, v in batch(model).items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def meta(config, kind):
    with torch.device("meta"):
        return kind(config)


BASE, LARGE = (
    transformers.BertConfig(),
    transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
)


@pytest.mark.parametrize(
    ("config", "kind", "method", "count"),
    [
        (BASE, transformers.BertModel, inlay.Bottleneck.pfeiffer(16), 894_528),
        (BASE, transformers.BertModel, inlay.Bottleneck(size=48), 1_789_056),
        (BASE, transformers.BertModel, inlay.Bottleneck.parallel(384), 7_091_712),
        (BASE, transformers.BertModel, inlay.Bottleneck.parallel(384, scale="learned"), 7_091_724),
        (BASE, transformers.BertModel, inlay.Bottleneck.houlsby(64, train_norms=False), 2_379_264),
        (BASE, transformers.BertModel, inlay.Bottleneck.houlsby(64), 2_379_264 + 38_400),
        (LARGE, transformers.BertModel, inlay.Bottleneck.houlsby(64, train_norms=False), 6_343_680),
        # 49 norms of 2 x 1024; a printed 2.1 % of BERT-large does not follow from these counts.
        (LARGE, transformers.BertModel, inlay.Bottleneck.houlsby(64), 6_343_680 + 100_352),
        (transformers.BartConfig(), transformers.BartModel, inlay.Bottleneck.scaled_parallel(512), 25_202_688),
    ],
    ids=lambda v: getattr(v, "__name__", "") or (f"{v:,}" if isinstance(v, int) else ""),
)
@pytest.mark.proves("count", "bottleneck")
def test_published_counts(config, kind, method, count):
    adapter = inlay.attach(meta(config, kind), method)
    assert adapter.trained_parameters == adapter.stored_parameters == count


def test_size_is_exact_and_a_ratio_is_sugar():
    """200 of 1024 by a ratio is lossy elsewhere (199); a size is what it says."""
    assert inlay.Bottleneck(size=200).size_for(1024) == 200
    assert inlay.Bottleneck(reduction=16).size_for(768) == 48


def test_refusals_name_rule_and_value():
    with pytest.raises(ValueError, match="size=8 or reduction=4"):
        inlay.Bottleneck(size=8, reduction=4)
    with pytest.raises(MethodError, match="fused"):
        inlay.attach(tiny("gpt2"), inlay.Bottleneck(size=4, sites="attn.q"))
    with pytest.raises(SiteError, match="cross"):
        inlay.attach(tiny("bert"), inlay.Bottleneck(size=4, sites="cross"))
