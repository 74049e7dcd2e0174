"""What every method keeps on every family. A new file in src/inlay/methods is covered without a line here.

A line in `cases.py` is needed where a method needs settings to work on tiny models (`SETTINGS`), where it promises to
leave the output unchanged at the start (`UNCHANGED`), or where it refuses a family by name (`REFUSED`).
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import inlay
from contracts.cases import (
    CASES,
    FAMILIES,
    REFUSED,
    SETTINGS,
    UNCHANGED,
    UNMIXED,
    WORKING,
    attached,
    method_of,
    pristine,
)
from inlay.errors import AdapterError, MethodError, SiteError
from inlay.methods.base import methods
from inlay.methods.full import Copy
from tiny import batch, tiny

GENERATES = ("causal", "seq2seq")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs_of(model, **options):
    inputs = batch(model, rows=3, length=7, **options)
    if model.config.is_encoder_decoder and "labels" not in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    return inputs


def logits_of(model, **options):
    # T5 on CPU takes another kernel where gradients are wanted, so bits are compared without them.
    with torch.no_grad():
        torch.manual_seed(0)
        return model(**inputs_of(model, labels=False, **options)).logits


def randomise(adapter, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def snapshot(model):
    """Everything that detaching must give back."""
    return {
        "keys": list(model.state_dict()),
        "classes": {n: type(m) for n, m in model.named_modules()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


@pytest.mark.proves("family")
@pytest.mark.parametrize(("name", "family"), CASES)
def test_attach_and_detach_leave_no_trace(name, family, record_property):
    """Base keys stay; the output is unchanged at the start where promised; detaching or a refusal restores all."""
    model = copy.deepcopy(pristine(family))
    before, logits, keys = snapshot(model), logits_of(model), list(model.state_dict())
    bits = {n: t.clone() for n, t in model.state_dict().items()}
    if (name, family) in REFUSED:
        with pytest.raises((MethodError, SiteError), match=REFUSED[name, family]) as refusal:
            inlay.attach(model, method_of(name))
        record_property("refusal", str(refusal.value))
    else:
        adapter = inlay.attach(model, method_of(name))
        assert [k for k in model.state_dict() if ".inlay." not in k] == keys
        assert adapter.trained_parameters > 0
        assert adapter.stored_parameters > 0
        if name in UNCHANGED:
            assert torch.equal(logits_of(model), logits)
        randomise(adapter)
        assert not torch.allclose(logits_of(model), logits, atol=1e-4), "the adapter does nothing"
        with inlay.use(model, None):
            assert torch.equal(logits_of(model), logits)
        adapter.detach()
    assert snapshot(model) == before
    assert all(torch.equal(t, bits[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits_of(model), logits)


@pytest.mark.proves("family")
@pytest.mark.proves("checkpointing")
@pytest.mark.parametrize(("name", "family"), WORKING)
def test_gradients_reach_the_adapter_alone_and_survive_checkpointing(name, family):
    model, adapter = attached(name, family)
    randomise(adapter)
    base = {n: p for n, p in model.named_parameters() if ".inlay." not in n}
    assert not any(p.requires_grad for p in base.values())
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        inputs = inputs_of(model)
        model(**inputs).loss.backward()
        assert all(p.grad is None for p in base.values())
        grads.append({n: p.grad for n, p in adapter.named_parameters() if p.requires_grad})
        for parameter in adapter.parameters():
            parameter.grad = None
    missing = [n for n, g in grads[0].items() if g is None]
    assert not missing, f"no gradient reaches {missing}"
    assert any(g.any() for g in grads[0].values())
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.proves("family")
@pytest.mark.parametrize(("name", "family"), WORKING)
def test_folder_copy_and_pickle_give_the_same_bits(name, family, tmp_path):
    model, adapter = attached(name, family)
    randomise(adapter)
    wanted = logits_of(model)
    adapter.save(tmp_path / "a")
    loaded = inlay.load(copy.deepcopy(pristine(family)), tmp_path / "a")
    assert torch.equal(logits_of(loaded.model), wanted)
    assert loaded.method == adapter.method
    twins = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    for kind, twin in twins.items():
        assert torch.equal(logits_of(twin), wanted), kind
        other = inlay.adapters(twin)["default"]
        assert other.model is twin
        randomise(other, 9)
        assert not torch.allclose(logits_of(twin), wanted, atol=1e-4), kind
    assert torch.equal(logits_of(model), wanted), "what trains in a copy is the copy's"


@pytest.mark.proves("mixed batch")
@pytest.mark.parametrize(("name", "family"), WORKING)
def test_rows_of_a_mixed_batch_equal_the_rows_alone(name, family, record_property):
    model, first = attached(name, family, "a")
    second = inlay.attach(model, method_of(name), name="b")
    randomise(first, 3)
    randomise(second, 4)
    alone = {}
    for adapter in ("a", "b", None):
        inlay.use(model, adapter)
        alone[adapter] = logits_of(model)
    rows = ["b", None, "a"]
    if (name, family) in UNMIXED:
        with pytest.raises(AdapterError, match=UNMIXED[name, family]) as refusal:
            inlay.use(model, rows)
        record_property("refusal", str(refusal.value))
        return
    inlay.use(model, rows)
    mixed = logits_of(model)
    mask = inputs_of(model, labels=False)["attention_mask"].bool()
    for i, adapter in enumerate(rows):
        got, wanted = mixed[i], alone[adapter][i]
        if got.ndim == 2 and got.shape[0] == mask.shape[1]:
            got, wanted = got[mask[i]], wanted[mask[i]]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)


@pytest.mark.proves("generate")
@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in WORKING if FAMILIES[f] in GENERATES])
def test_generation_with_and_without_a_cache_agrees(name, family):
    model, adapter = attached(name, family)
    randomise(adapter)
    inputs = inputs_of(model, labels=False, padding="left" if FAMILIES[family] == "causal" else "right")
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": model.config.pad_token_id}
    found = [model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)
    with inlay.use(model, None):
        assert model.generate(**inputs, **settings).shape == found[0].shape


@pytest.mark.proves("compile")
@pytest.mark.parametrize("name", [n for n in methods() if (n, "qwen2") not in REFUSED] + ["headonly"])
def test_a_compiled_model_is_one_graph_and_sees_what_is_attached_afterwards(name):
    family, task = ("bert", "cls") if name == "headonly" else ("qwen2", "causal")
    model = tiny(family, task, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    adapter = inlay.attach(model, method_of(name))
    randomise(adapter)
    wanted = logits_of(model)
    torch.testing.assert_close(logits_of(compiled), wanted, rtol=1e-5, atol=1e-5)
    randomise(adapter, 9)
    after = logits_of(model)
    assert not torch.allclose(after, wanted, atol=1e-4)
    torch.testing.assert_close(logits_of(compiled), after, rtol=1e-5, atol=1e-5)


def test_the_tables_speak_of_methods_that_exist():
    assert set(SETTINGS) | UNCHANGED | {name for name, _ in REFUSED} <= set(methods())
    assert issubclass(Copy, torch.nn.Module)
