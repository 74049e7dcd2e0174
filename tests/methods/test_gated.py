"""Gates: what they read, what they must not see, and UniPELT and MAM as mixes of cells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import inlay
from inlay.anatomy.base import Site
from inlay.errors import AdapterError, MergeError
from inlay.methods.gated import Gate, plot_gates, record_gates
from inlay.methods.unipelt import UniPELT
from tiny import batch, tiny

SMALL = UniPELT(rank=2, length=3, mid=None, reduction=8)


def shake(adapter, seed=3, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def features(model, **changes):
    inputs = batch(model, **changes)
    labels = inputs.pop("labels")
    return inputs | ({"decoder_input_ids": labels.clamp_min(0)} if model.config.is_encoder_decoder else {})


def site(causal):
    return Site("attn.q", "q", "q", 4, 4, causal=causal)


def test_gate_forms_against_the_formula():
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for form, causal in (("published", False), ("mean", False), ("per_token", True)):
        gate = Gate(site(causal), 4, form)
        token = torch.sigmoid(x @ gate.weight.T + gate.bias)
        want = {
            "per_token": token,
            "published": token.mean(1, keepdim=True),
            "mean": torch.stack([token[0, :3].mean(0, keepdim=True), token[1].mean(0, keepdim=True)]),
        }[form]
        torch.testing.assert_close(gate(x, mask), want)


def test_auto_takes_the_form_that_is_right_for_the_model():
    assert Gate(site(True), 4, "auto").form == "per_token"
    assert Gate(site(False), 4, "auto").form == "mean"


@pytest.mark.proves("oracle", "unipelt")
def test_the_gated_low_rank_replaces_alpha_over_rank_by_the_gate():
    model = tiny("bert")
    adapter = inlay.attach(model, inlay.Inlay(form="low_rank", size=2, sites="attn.q", composition="gated"), head=None)
    shake(adapter)
    inputs = features(model)
    seen = {}
    query = model.bert.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    model(**inputs)
    p = {n.rsplit("query.inlay.", 1)[1]: t for n, t in adapter.named_parameters() if "layer.0." in n}
    mask = inputs["attention_mask"][..., None].float()
    token = torch.sigmoid(seen["x"] @ p["gate.weight"].T + p["gate.bias"])
    g = (token * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    want = F.linear(seen["x"], query.weight, query.bias) + g * (seen["x"] @ p["inner.A"].T @ p["inner.B"].T)
    torch.testing.assert_close(seen["y"], want, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_in_an_encoder_unless_published():
    for gate, stable in (("auto", True), ("published", False)):
        model = tiny("bert")
        shake(inlay.attach(model, SMALL.model_copy(update={"gate": gate}), head=None), size=0.6)
        ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            short = model(input_ids=ids, attention_mask=mask).logits
            long = model(input_ids=F.pad(ids, (0, 4)), attention_mask=F.pad(mask, (0, 4))).logits
        assert torch.allclose(short, long, atol=1e-5) == stable


def test_a_causal_model_never_sees_the_future_unless_published():
    for gate, causal in (("auto", True), ("published", False)):
        model = tiny("gpt2")
        shake(inlay.attach(model, SMALL.model_copy(update={"gate": gate})))
        ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
        other = ids.clone()
        other[:, -1] = 5
        with torch.no_grad():
            moved = (model(input_ids=ids).logits - model(input_ids=other).logits)[:, :-1].abs().max()
        assert bool(moved < 1e-5) == causal


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cached_decoding_equals_one_pass(family):
    model = tiny(family)
    shake(inlay.attach(model, SMALL))
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(second, whole[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.proves("oracle", "unipelt")
def test_a_prefix_gate_per_token_is_a_gated_sum_for_each_query():
    """softmax([g q P_k^T, q K^T]) [g P_v; V], row by row."""
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.Inlay(form="kv", size=3, composition="gated", layers=(0,)))
    shake(adapter, size=0.5)
    attention = model.model.layers[0].self_attn
    ids = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(1))
    seen = {}
    attention.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    attention.register_forward_pre_hook(
        lambda m, a, k: seen.update(x=k["hidden_states"], rope=k["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids)
    x, (cos, sin) = seen["x"], seen["rope"]
    heads = lambda t, n: t.view(1, 5, n, 8).transpose(1, 2)  # noqa: E731
    q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(
        heads(attention.q_proj(x), 4), heads(attention.k_proj(x), 2), cos, sin
    )
    v = heads(attention.v_proj(x), 2)
    p = {n.rsplit("self_attn.inlay.", 1)[1]: t for n, t in adapter.named_parameters()}
    g = torch.sigmoid(x @ p["gate.weight"].T + p["gate.bias"])[0, :, 0]
    pk, pv = (p[f"inner.P_{n}"].view(3, 2, 8).transpose(0, 1) for n in "kv")
    out = torch.zeros(4, 5, 8)
    for h in range(4):
        for t in range(5):
            keys = torch.cat([g[t] * pk[h // 2], k[0, h // 2, : t + 1]])
            values = torch.cat([g[t] * pv[h // 2], v[0, h // 2, : t + 1]])
            out[h, t] = torch.softmax(keys @ q[0, h, t] * 8**-0.5, 0) @ values
    torch.testing.assert_close(seen["out"][0], out.transpose(0, 1).reshape(5, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_rows_of_a_mixed_batch_with_gates_equal_the_rows_alone(family):
    model = tiny(family, dtype=torch.float64)
    shake(inlay.attach(model, SMALL, name="uni", head=None), 1)
    shake(inlay.attach(model, inlay.LoRA(rank=2), name="lora", head=None), 2)
    rows = ["uni", None, "lora", "uni"]
    inputs = features(model, rows=4)
    with torch.no_grad(), inlay.use(model, rows):
        mixed = model(**inputs).logits
    for i, name in enumerate(rows):
        with torch.no_grad(), inlay.use(model, name):
            torch.testing.assert_close(mixed[i], model(**inputs).logits[i], rtol=1e-9, atol=1e-9)


def meta(config, kind):
    with torch.device("meta"):
        return kind(config)


@pytest.mark.proves("count", "mam", "unipelt", "inlay")
def test_published_counts():
    bert = transformers.BertConfig()
    direct = inlay.attach(meta(bert, transformers.BertModel), UniPELT(mid=None))
    assert direct.trained_parameters == 1_410_672
    trained = inlay.attach(meta(bert, transformers.BertModel), UniPELT())
    # 11,083,376 in the adapters library, which counts the same pieces with the MLP still there.
    assert (trained.trained_parameters, trained.stored_parameters) == (11_083_376, 1_410_672)
    # Its AP has two gates a layer: 895K + 184K + 2 * 12 * 769.
    ap = inlay.attach(meta(bert, transformers.BertModel), UniPELT(variant="ap", mid=None))
    assert ap.trained_parameters == 1_097_304
    bart = inlay.attach(meta(transformers.BartConfig(), transformers.BartModel), inlay.MAM())
    assert (bart.trained_parameters, bart.stored_parameters) == (86_810_976, 27_414_528)
    base = inlay.attach(meta(bert, transformers.BertModel), inlay.MAM(size=384))
    assert base.trained_parameters == 22_493_984


@pytest.mark.proves("oracle", "mam")
def test_mam_is_its_two_parts():
    model = tiny("bart")
    mam = inlay.attach(model, inlay.MAM(length=3, mid=None, size=4), name="mam")
    shake(mam)
    mix = inlay.Prefix(length=3) + inlay.Bottleneck.scaled_parallel(4)
    twin = inlay.attach(model, mix, name="mix")
    with torch.no_grad():
        for a, b in zip(mam.parameters(), twin.parameters(), strict=True):
            assert a.shape == b.shape
            b.copy_(a)
    inputs = features(model)
    with torch.no_grad():
        with inlay.use(model, "mam"):
            a = model(**inputs).logits
        assert torch.equal(a, model(**inputs).logits)


def test_an_encoder_called_by_itself_knows_its_own_padding():
    """As `generate` calls it: the mask of an earlier batch must not act, whatever its shape."""
    model = tiny("bart")
    shake(inlay.attach(model, inlay.UniPELT(rank=2, length=3, mid=8, reduction=8)))
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    padded, mask = torch.nn.functional.pad(ids, (0, 3)), torch.ones(2, 10)
    mask[:, 7:] = 0
    encoder = model.get_encoder()
    with torch.no_grad():
        model(input_ids=ids[:1], attention_mask=torch.ones(1, 7), decoder_input_ids=ids[:1, :2])
        alone = encoder(ids, torch.ones(2, 7)).last_hidden_state
        beside = encoder(padded, attention_mask=mask).last_hidden_state[:, :7]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
    inlay.detach(model, "default")
    assert type(encoder) is transformers.models.bart.modeling_bart.BartEncoder


def test_a_part_of_a_model_called_by_itself_is_refused_by_a_mean_gate():
    model = tiny("bert", "cls")
    shake(inlay.attach(model, inlay.UniPELT(rank=2, length=3, mid=8, reduction=8)))
    inputs = batch(model, 2, 7, labels=False)
    with torch.no_grad():
        model(**inputs)
        with pytest.raises(AdapterError, match="padding"):
            model.bert(**inputs)


def test_the_example_of_a_cell_that_no_method_names():
    """The code of docs/design_space.md runs as it stands there, and does what the page says."""
    page = Path(__file__).resolve().parents[2] / "docs" / "design_space.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    names: dict[str, object] = {}
    exec("\n".join(code), names)
    adapter, losses = names["adapter"], names["losses"]
    assert losses[-1] < 0.95 * losses[0]
    assert {s.name for s in adapter.sites} == {"ffn", "heads"}
    assert len(names["values"]) == 2
    with pytest.raises(MergeError, match=r"no weight holds|more between"):
        adapter.merge()


@pytest.mark.proves("oracle", "inlay")
@pytest.mark.parametrize(("cell", "named"), [
    ({"form": "low_rank", "size": 2, "sites": ("attn.q", "attn.v"), "composition": 4.0},
     inlay.LoRA(rank=2, alpha=8.0, sites=("attn.q", "attn.v"))),
    ({"form": "bottleneck", "size": 3, "sites": ("attn", "ffn"), "insertion": "sequential"},
     inlay.Bottleneck(size=3, activation="relu")),
    ({"form": "bottleneck", "size": 3, "composition": "learned"}, inlay.Bottleneck.parallel(3, scale="learned")),
    ({"form": "kv", "size": 3}, inlay.Prefix(length=3)),
    ({"form": "kv_relu", "size": 3}, inlay.MultiHead(length=3)),
])  # fmt: skip
def test_the_rows_of_the_table_are_the_methods_they_name(cell, named):
    """He et al.'s table 1: a cell has the function and the gradients of the method, which has an oracle of its own."""
    model = tiny("bart")
    ours, theirs = inlay.attach(model, inlay.Inlay(**cell), name="cell"), inlay.attach(model, named, name="named")
    shake(ours)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a)
    found = []
    for adapter in (ours, theirs):
        with inlay.use(model, adapter.name):
            logits = model(**features(model)).logits
            logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in adapter.parameters())])
    for a, b in zip(*found, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_parallel_low_rank_on_projections_is_lora_and_merges():
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.Inlay(form="low_rank", size=2, sites="attn.q", composition=4.0))
    shake(adapter)
    piece = next(iter(adapter.pieces.values()))
    torch.testing.assert_close(piece.weight_delta(), 4.0 * piece.B @ piece.A)
    gated = inlay.attach(model, SMALL, name="gated")
    with pytest.raises(MergeError):
        next(iter(gated.pieces.values())).weight_delta()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"form": "kv", "insertion": "sequential"}, "insertion is parallel"),
        ({"form": "kv", "composition": 4.0}, "composes by attention"),
        ({"form": "low_rank", "reduction": 4}, "takes size"),
        ({"form": "bottleneck", "mid": 4}, "mid reparametrises"),
    ],
)
def test_cells_that_are_not_defined_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        inlay.Inlay(**settings)


def test_gates_can_be_recorded_and_plotted():
    model = tiny("bert")
    adapter = inlay.attach(model, SMALL, head=None)
    with record_gates(adapter) as values:
        model(**features(model))
        model(**features(model))
    assert len(values) == 2 * 4
    assert all(len(v) == 2 and v[0].shape == (3,) and 0 < v[0].min() < v[0].max() + 1e-6 < 1 for v in values.values())
    assert plot_gates(values).axes


def test_save_and_load_with_a_shared_mlp(tmp_path):
    model = tiny("bert")
    adapter = inlay.attach(model, UniPELT(rank=2, length=3, mid=5, reduction=8))
    shake(adapter)
    with torch.no_grad():
        want = model(**features(model)).logits
    for keep in (False, True):
        adapter.save(tmp_path / "a", keep_training_state=keep)
        fresh = tiny("bert")
        again = inlay.load(fresh, tmp_path / "a")
        with torch.no_grad():
            assert torch.equal(fresh(**features(fresh)).logits, want)
        assert (again.trained_parameters == adapter.trained_parameters) == keep
