"""The adapter folder: exact round trips, and one clear error for everything that can be wrong with it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import inlay
from inlay.errors import FormatError
from tiny import batch, tiny


def features(model):
    inputs = batch(model)
    labels = inputs.pop("labels")
    return inputs | ({"decoder_input_ids": labels.clamp_min(0)} if model.config.is_encoder_decoder else {})


def trained(family="llama", method=None, seed=3):
    model = tiny(family)
    adapter = inlay.attach(model, method or inlay.LoRA(rank=2), name="legal")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, adapter


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "t5"])
def test_save_then_load_gives_the_same_bits(family, tmp_path):
    model, adapter = trained(family, inlay.LoRA(rank=2) + inlay.Bottleneck(size=3))
    with torch.no_grad():
        expected = model(**features(model)).logits
    adapter.save(tmp_path / "a")
    fresh = tiny(family)
    again = inlay.load(fresh, tmp_path / "a")
    assert again.name == "legal"
    assert again.method == adapter.method
    with torch.no_grad():
        assert torch.equal(fresh(**features(fresh)).logits, expected)


def test_the_name_of_the_adapter_is_no_part_of_a_tensor_name(tmp_path):
    _, adapter = trained()
    adapter.save(tmp_path / "a")
    names = set(load_file(tmp_path / "a" / "adapter.safetensors"))
    assert "model.layers.0.self_attn.q_proj.lora.A" in names
    assert not any("legal" in n or "inlay" in n for n in names)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_saving_is_deterministic_and_leaves_nothing_beside(tmp_path):
    _, adapter = trained()
    adapter.save(tmp_path / "a")
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    adapter.save(tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == first
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_tied_copies_are_stored_once(tmp_path):
    model, adapter = trained("bart", inlay.Full())
    adapter.save(tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(tuple(t.shape) == tuple(model.model.shared.weight.shape) for t in names.values()) == 1
    fresh = tiny("bart")
    inlay.load(fresh, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(fresh(**features(fresh)).logits, model(**features(model)).logits)


def test_another_base_is_refused_and_named(tmp_path):
    _, adapter = trained()
    adapter.save(tmp_path / "a")
    with pytest.raises(FormatError, match=r"another base \(LlamaForCausalLM.*holds other values"):
        inlay.load(tiny("llama", seed=1), tmp_path / "a")
    inlay.load(tiny("llama", seed=1), tmp_path / "a", allow_other_base=True)
    with pytest.raises(FormatError, match="other names or shapes"):
        inlay.load(tiny("gpt2"), tmp_path / "a")


def test_the_same_base_in_another_dtype_is_the_same_base(tmp_path):
    _, adapter = trained()
    adapter.save(tmp_path / "a")
    inlay.load(tiny("llama", dtype=torch.bfloat16), tmp_path / "a")


def test_the_fingerprint_does_not_see_adapters_or_heads(tmp_path):
    _, adapter = trained("bert")
    adapter.save(tmp_path / "a")
    other = tiny("bert")
    with torch.no_grad():
        other.classifier.weight.add_(1)
    inlay.attach(other, inlay.Bottleneck(size=2), name="other")
    inlay.load(other, tmp_path / "a")
    assert set(inlay.adapters(other)) == {"other", "legal"}


def test_a_head_of_another_width_comes_with_its_adapter(tmp_path):
    _, adapter = trained("bert")
    adapter.save(tmp_path / "a")
    wide = tiny("bert")
    wide.classifier = torch.nn.Linear(32, 7)
    inlay.load(wide, tmp_path / "a")
    with torch.no_grad():
        assert wide(**features(wide)).logits.shape[-1] == 3
        with inlay.use(wide, None):
            assert wide(**features(wide)).logits.shape[-1] == 7


def rewrite(folder, **changes):
    from inlay.formats.native import _checksum

    config = json.loads((folder / "adapter.json").read_text())
    config.update(changes)
    config["checksum"] = _checksum(config)
    (folder / "adapter.json").write_text(json.dumps(config))


def test_everything_wrong_is_one_clear_error(tmp_path):
    _, adapter = trained()
    folder = tmp_path / "a"

    def fresh():
        adapter.save(folder)
        return folder

    with pytest.raises(FormatError, match="not a folder"):
        inlay.load(tiny("llama"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds nothing"):
        inlay.load(tiny("llama"), tmp_path / "empty")
    (fresh() / "adapter.safetensors").unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        inlay.load(tiny("llama"), folder)
    rewrite(fresh(), format_version=99)
    with pytest.raises(FormatError, match="version 99"):
        inlay.load(tiny("llama"), folder)
    rewrite(fresh(), colour="red")
    with pytest.raises(FormatError, match="unknown keys \\['colour'\\]"):
        inlay.load(tiny("llama"), folder)
    rewrite(fresh(), method={"method": "lora", "rang": 4})
    with pytest.raises(ValueError, match="rang"):
        inlay.load(tiny("llama"), folder)
    rewrite(fresh(), method={"method": "lora", "rank": 3})
    with pytest.raises(FormatError, match=r"wrong shape .*lora.A: \(2, 32\) instead of \(3, 32\)"):
        inlay.load(tiny("llama"), folder)
    rewrite(fresh(), method={"method": "lora", "rank": 2, "sites": ["attn.q"]})
    with pytest.raises(FormatError, match=r"unexpected model.layers.0.mlp"):
        inlay.load(tiny("llama"), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match="no adapter folder"):
        adapter.save(tmp_path / "mine")


def test_a_refused_folder_leaves_the_model_untouched(tmp_path):
    _, adapter = trained()
    adapter.save(tmp_path / "a")
    rewrite(tmp_path / "a", method={"method": "lora", "rank": 3})
    model = tiny("llama")
    keys = list(model.state_dict())
    with pytest.raises(FormatError):
        inlay.load(model, tmp_path / "a")
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    which=st.sampled_from(["adapter.json", "adapter.safetensors"]),
    where=st.floats(0, 1),
    cut=st.booleans(),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path_factory, which, where, cut, bit):
    folder = tmp_path_factory.getbasetemp() / "flips"
    if not folder.exists():
        trained()[1].save(folder)
    file = folder / which
    good = file.read_bytes()
    at = min(int(where * len(good)), len(good) - 1)
    bad = good[:at] if cut else good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :]
    file.write_bytes(bad)
    try:
        from inlay.formats.native import read_config, read_tensors

        if cut and good[at:].strip() == b"":
            return
        with pytest.raises(FormatError):
            read_tensors(folder, read_config(folder))
    except BaseException:
        file.write_bytes(good)
        raise
    finally:
        file.write_bytes(good)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_never_crash_the_reader(tmp_path_factory, blob):
    from inlay.formats.native import read_config

    folder = tmp_path_factory.mktemp("random")
    (folder / "adapter.json").write_bytes(blob)
    with pytest.raises(FormatError):
        read_config(folder)
