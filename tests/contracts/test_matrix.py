"""What docs/methods.md says of each method beyond the invariants: resume, merge, bf16, quantised base, PEFT's format.

Every method is asked every question. Where the answer is no, the test holds the refusal to its words, and the page
prints them. A new file in src/inlay/methods is asked without a line here.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import pkgutil

import pytest
import torch

import inlay
import inlay.methods
from contracts.cases import SETTINGS, attached, method_of, pristine
from inlay.errors import FormatError, MergeError, MethodError
from inlay.methods.base import methods
from inlay.quant import NF4, dequantize_model, quantize
from tiny import batch, tiny

# Qwen 2 has biases on q, k and v and fewer key heads than query heads; a task head of its own is BERT's.
HOME = {"headonly": "bert"}
LINEAR = {"adalora", "bitfit", "diffpruning", "dora", "full", "headonly", "ia3", "lora"}
UNLINEAR = {
    "bottleneck": "more between than one weight",
    "inlay": "more between than one weight",
    "mam": "keys and values",
    "multihead": "attention",
    "prefix": "keys and values",
    "prompt": "tokens",
    "ptuning": "tokens",
    "ptuningv2": "keys and values",
    "unipelt": "keys and values",
}
IN_PEFT = {"adalora", "dora", "ia3", "lora", "prefix", "prompt", "ptuning", "ptuningv2"}


def home(name):
    return HOME.get(name, "qwen2")


def excite(adapter, seed=7, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=size)


def logits_of(model):
    with torch.no_grad():
        return model(**batch(model, labels=False)).logits


def steps(model, adapter, optimizer, first, last):
    """Optimizer steps `first` to `last`, each with rows and dropout of its own."""
    for step in range(first, last):
        torch.manual_seed(step)
        model.train()
        model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(adapter):
    return torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)


@pytest.mark.proves("resume")
@pytest.mark.parametrize("name", methods())
def test_resumed_from_its_own_folder_it_goes_on_with_the_same_bits(name, tmp_path):
    """Six steps in one go equal three, save, load into a fresh model, three more."""
    dropout = {"dropout": 0.2} if "dropout" in methods()[name].model_fields else {}
    planned = {"total_steps": 6} if name == "adalora" else {}
    model, adapter = attached(name, home(name), **dropout, **planned)
    optimizer = optimizer_of(adapter)
    for piece in adapter.pieces.values():
        piece.begin(6)
    steps(model, adapter, optimizer, 0, 3)
    adapter.save(tmp_path / "a", keep_training_state=True)
    moments = copy.deepcopy(optimizer.state_dict())
    steps(model, adapter, optimizer, 3, 6)

    fresh = copy.deepcopy(pristine(home(name)))
    again = inlay.load(fresh, tmp_path / "a")
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(moments)
    for piece in again.pieces.values():
        piece.begin(6)
    steps(fresh, again, optimizer, 3, 6)
    wanted, found = adapter.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys()
    different = [n for n, t in wanted.items() if not torch.equal(found[n], t)]
    assert not different, f"other bits in {different}"


@pytest.mark.proves("merge")
@pytest.mark.parametrize("name", methods())
def test_merged_it_is_the_same_function_or_is_refused_by_name(name, record_property):
    model, adapter = attached(name, home(name))
    excite(adapter)
    wanted = logits_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".inlay." not in n}
    if name in LINEAR:
        adapter.merge()
        torch.testing.assert_close(logits_of(model), wanted, rtol=1e-5, atol=1e-5)
        adapter.unmerge()
    else:
        with pytest.raises(MergeError, match=UNLINEAR[name]) as refusal:
            adapter.merge()
        record_property("refusal", str(refusal.value))
    assert torch.equal(logits_of(model), wanted)
    now = {n: p for n, p in model.named_parameters() if ".inlay." not in n}
    assert all(torch.equal(now[n], t) for n, t in before.items()), "unmerging restores every bit"


@pytest.mark.proves("bf16")
@pytest.mark.parametrize("name", methods())
def test_on_a_bf16_base_masters_stay_fp32_and_learn(name):
    family = home(name)
    exact, adapter = attached(name, family)
    excite(adapter)
    model = copy.deepcopy(exact)
    inlay.detach(model)
    model.to(torch.bfloat16)
    torch.manual_seed(1)
    rounded = inlay.attach(model, method_of(name))
    rounded.load_state_dict(adapter.state_dict())
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    found, wanted = logits_of(model), logits_of(exact)
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), wanted.flatten(), dim=0) > 0.99
    model.train()
    model(**batch(model)).loss.backward()
    grads = {n: p.grad for n, p in rounded.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    assert math.fsum(float(g.abs().sum()) for g in grads.values()) > 0


@pytest.mark.proves("quantised base")
@pytest.mark.parametrize("name", methods())
def test_on_a_quantised_base_it_computes_what_it_computes_on_the_dense_copy(name, record_property):
    family = home(name)
    model = quantize(tiny(family, "cls" if family == "bert" else "causal"), NF4(double_quant=False))
    if name == "full":
        with pytest.raises(MethodError, match="stored quantised") as refusal:
            inlay.attach(model, method_of(name))
        record_property("refusal", str(refusal.value))
        return
    dense = dequantize_model(copy.deepcopy(model))
    grads = []
    for each in (model, dense):
        torch.manual_seed(1)
        adapter = inlay.attach(each, method_of(name))
        excite(adapter)
        each(**batch(each)).loss.backward()
        grads.append({n: p.grad for n, p in adapter.named_parameters() if p.requires_grad})
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-4)
    for key, grad in grads[1].items():
        torch.testing.assert_close(grads[0][key], grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.proves("PEFT in/out")
@pytest.mark.parametrize("name", [n for n in methods() if n not in IN_PEFT])
def test_what_peft_has_no_method_for_is_refused_by_name(name, tmp_path, record_property):
    _, adapter = attached(name, home(name))
    with pytest.raises(FormatError) as refusal:
        adapter.save(tmp_path / "a", format="peft")
    record_property("refusal", str(refusal.value))
    assert list(tmp_path.iterdir()) == []


def test_every_method_is_one_file_and_every_file_of_a_method_is_asked():
    """Helpers beside the methods are those without a method in them."""
    found = {cls.__module__.rpartition(".")[2] for cls in methods().values()}
    files = {info.name for info in pkgutil.iter_modules(inlay.methods.__path__)}
    assert files - found == {"base", "budget", "gated", "positions"}
    assert set(SETTINGS) <= set(methods())
    assert set(methods()) == LINEAR | set(UNLINEAR)
    assert importlib.util.find_spec("peft") is None or set(methods()) >= IN_PEFT
