"""`save_pretrained` of a model with adapters: nothing is lost, and the user hears how to load it."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

import inlay
from inlay.errors import AdapterError
from tiny import batch, tiny


def fill(adapter: inlay.Adapter) -> inlay.Adapter:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    return adapter


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits  # type: ignore[no-any-return]


def test_adapters_lie_beside_the_base_and_load(tmp_path: Path) -> None:
    model = tiny("llama")
    fill(inlay.attach(model, inlay.LoRA(rank=2), name="a"))
    fill(inlay.attach(model, inlay.IA3(), name="b"))
    with pytest.warns(UserWarning, match=r"without \['a', 'b'\].*inlay.load\(model, '.*adapters/a'\)"):
        model.save_pretrained(tmp_path)
    base = type(tiny("llama")).from_pretrained(tmp_path)
    for name in ("a", "b"):
        inlay.load(base, tmp_path / "adapters" / name)
        with inlay.use(model, name):
            expected = logits(model)
        assert torch.equal(logits(base), expected)


def test_the_weights_of_a_merged_adapter_are_not_loaded_twice(tmp_path: Path) -> None:
    model = tiny("llama")
    fill(inlay.attach(model, inlay.LoRA(rank=2), name="a")).merge()
    with pytest.warns(UserWarning, match=r"hold merged \['a'\]; inlay.export"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapters").exists()
    assert torch.equal(logits(type(tiny("llama")).from_pretrained(tmp_path)), logits(model))


def test_the_base_alone_is_saved_without_a_word(tmp_path: Path) -> None:
    model = tiny("llama")
    cls, tensors = type(model), model.state_dict()
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "given", state_dict=tensors)
        adapter.detach()
        model.save_pretrained(tmp_path / "after")
    assert type(model) is cls
    assert not (tmp_path / "given" / "adapters").exists()
    assert not (tmp_path / "after" / "adapters").exists()


def test_copies_save_themselves(tmp_path: Path) -> None:
    model = tiny("llama")
    fill(inlay.attach(model, inlay.LoRA(rank=2), name="a"))
    for number, copied in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            next(iter(inlay.adapters(copied)["a"].parameters())).zero_()
        with pytest.warns(UserWarning, match="from_pretrained"):
            copied.save_pretrained(tmp_path / str(number))
        base = type(tiny("llama")).from_pretrained(tmp_path / str(number))
        inlay.load(base, tmp_path / str(number) / "adapters" / "a")
        assert torch.equal(logits(base), logits(copied))
        assert not torch.equal(logits(base), logits(model))


@pytest.mark.parametrize("method", [inlay.Prompt(length=3), inlay.LoRA(rank=2)], ids=["prompt", "lora"])
def test_a_dispatched_model_passes_through_its_host(method: inlay.Method) -> None:
    """accelerate calls the forward that it bound before: virtual tokens would be left out without a word."""
    model, plain = tiny("llama"), tiny("llama")
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    torch.manual_seed(0)
    adapter = fill(inlay.attach(model, method))
    other = inlay.attach(plain, method)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(logits(model), logits(plain))
    with inlay.use(model, [adapter.name, None, None]), inlay.use(plain, [other.name, None, None]):
        assert torch.equal(logits(model), logits(plain))
    with pytest.raises(AdapterError, match="rows"), inlay.use(model, [adapter.name]):
        logits(model)
    adapter.detach()
    other.detach()
    assert torch.equal(logits(model), logits(plain))
