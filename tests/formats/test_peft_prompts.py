"""PEFT's folders of virtual tokens and prefixes, against PEFT itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from comparing import randomise
from inlay.errors import FormatError, MethodError
from tiny import batch, tiny

peft = pytest.importorskip("peft")

LENGTH = 4
KINDS = {"cls": "SEQ_CLS", "token": "TOKEN_CLS", "seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}


def inputs(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return batch(model, labels=model.config.is_encoder_decoder, **options)


def peft_logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs(model.get_base_model(), **options)).logits


def ours_logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model, **options)).logits


def write_theirs(family: str, task: str, config: Any, folder: Path, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(family, task), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        model.save_pretrained(folder)
    return peft_logits(model, **options)


def in_peft(family: str, task: str, folder: Path, **options: Any) -> Tensor:
    return peft_logits(peft.PeftModel.from_pretrained(tiny(family, task), folder).eval(), **options)


def text_of(found: Tensor, like: Tensor) -> Tensor:
    """PEFT returns logits for the virtual tokens too, where there are logits for each token."""
    return found[:, -like.shape[1] :] if found.ndim == 3 else found


PROMPTS = [
    ("llama", "causal"),
    ("gpt2", "causal"),
    ("opt", "causal"),
    ("bert", "cls"),
    ("roberta", "cls"),
    ("bert", "token"),
    ("t5", "seq2seq"),
    ("bart", "seq2seq"),
]


@pytest.mark.parametrize(("family", "task"), PROMPTS)
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
@pytest.mark.proves("PEFT in/out", "prompt", "ptuning")
def test_virtual_tokens_from_peft_and_back(family, task, kind, tmp_path):
    if kind == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type=KINDS[task])
    else:
        config = peft.PromptEncoderConfig(num_virtual_tokens=LENGTH, encoder_hidden_size=16, task_type=KINDS[task])
    expected = write_theirs(family, task, config, tmp_path / "peft")
    model = tiny(family, task)
    adapter = inlay.load(model, tmp_path / "peft")
    found = ours_logits(model)
    torch.testing.assert_close(found, text_of(expected, found), atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours", format="peft")
    torch.testing.assert_close(in_peft(family, task, tmp_path / "ours"), expected, atol=1e-5, rtol=1e-5)


PREFIXES = [
    ("llama", "causal", {}),
    ("qwen3", "causal", {}),
    ("gpt_neox", "causal", {}),
    ("gpt2", "causal", {}),
    ("opt", "causal", {}),
    ("bert", "cls", {}),
    ("roberta", "token", {}),
    ("bart", "seq2seq", {}),
]


@pytest.mark.parametrize(("family", "task", "options"), PREFIXES)
@pytest.mark.proves("PEFT in/out", "prefix")
def test_prefixes_from_peft_and_back(family, task, options, tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type=KINDS[task], **options)
    expected = write_theirs(family, task, config, tmp_path / "peft")
    model = tiny(family, task)
    plain = ours_logits(model)
    adapter = inlay.load(model, tmp_path / "peft")
    found = ours_logits(model)
    assert not torch.allclose(found, plain, atol=1e-2)
    real = inputs(model)["attention_mask"].bool() if found.ndim == 3 and task != "seq2seq" else ...
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours", format="peft")
    torch.testing.assert_close(in_peft(family, task, tmp_path / "ours")[real], expected[real], atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "native")
    again = tiny(family, task)
    inlay.load(again, tmp_path / "native")
    assert torch.equal(ours_logits(again), found)


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("llama", "causal", inlay.Prefix(length=3)),
        ("gpt2", "causal", inlay.Prefix(length=3, shifts_positions=True)),
        ("bert", "cls", inlay.Prefix(length=3, mid=8, shifts_positions=True)),
        ("llama", "causal", inlay.PTuningV2(length=3)),
        ("llama", "causal", inlay.Prompt(length=3)),
        ("bert", "cls", inlay.Prompt(length=3, after=0)),
        ("llama", "causal", inlay.PTuning(template="{prompt:3} {text}")),
        ("t5", "seq2seq", inlay.Prompt(length=3)),
    ],
)
@pytest.mark.proves("PEFT in/out", "ptuningv2")
def test_ours_in_peft(family, task, method, tmp_path):
    model = tiny(family, task)
    adapter = randomise(inlay.attach(model, method))
    expected = ours_logits(model)
    adapter.save(tmp_path / "a", format="peft")
    adapter.save(tmp_path / "b", format="peft")
    found = text_of(in_peft(family, task, tmp_path / "a"), expected)
    real = inputs(model)["attention_mask"].bool() if found.ndim == 3 and task != "seq2seq" else ...
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("family", "task", "method", "named"),
    [
        ("gpt2", "causal", inlay.Prefix(length=3), "positions begin behind"),
        ("llama", "causal", inlay.Prefix(length=3, layers=(0,)), "one prefix for every self-attention"),
        ("bart", "seq2seq", inlay.Prefix(length=3), "decoder self-attention"),
        ("bart", "seq2seq", inlay.Prefix(length=3, sites="decoder:heads", shifts_positions=True), "these differ"),
        ("t5", "seq2seq", inlay.Prefix(length=3, sites="decoder:heads"), "relative biases"),
        ("mistral", "causal", inlay.Prefix(length=3), "sliding windows"),
        ("llama", "causal", inlay.Prefix(length=3) + inlay.LoRA(rank=2), "is Prefix[+]LoRA[.]"),
        ("llama", "causal", inlay.Prompt(length=3) + inlay.LoRA(rank=2), "is Prompt[+]LoRA[.]"),
        ("bert", "cls", inlay.Prompt(length=3), "before everything"),
        ("llama", "causal", inlay.PTuning(template="{prompt:2} {text} {prompt:2}"), "before everything"),
        ("roberta", "cls", inlay.MAM(), "is MAM[.]"),
    ],
)
def test_what_peft_has_no_place_for_is_refused_by_name(family, task, method, named, tmp_path):
    adapter = inlay.attach(tiny(family, task), method)
    with pytest.raises(FormatError, match=named):
        adapter.save(tmp_path / "a", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_models_without_a_table_of_positions_cannot_shift_them():
    with pytest.raises(MethodError, match="looks no positions up"):
        inlay.attach(tiny("llama"), inlay.Prefix(length=3, shifts_positions=True))


@pytest.mark.parametrize(
    ("family", "padding"), [("gpt2", "right"), ("gpt2", "none"), ("llama", "left"), ("opt", "left")]
)
def test_a_read_prefix_in_generate_and_in_mixed_batches(family, padding, tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
    write_theirs(family, "causal", config, tmp_path / "peft")
    model = tiny(family)
    adapter = inlay.load(model, tmp_path / "peft", "theirs")
    own = batch(model, rows=3, padding=padding, labels=False)
    assert torch.equal(adapter.model(**own).logits, model(**own).logits)
    with torch.no_grad():
        alone = model(**own).logits
        inlay.attach(model, inlay.LoRA(rank=2), name="other")
        randomise(inlay.adapters(model)["other"])
        other = model(**own).logits
        inlay.use(model, ["theirs", "other", "theirs"])
        mixed = model(**own).logits
    real = own["attention_mask"].bool()
    for row, expected in enumerate((alone, other, alone)):
        torch.testing.assert_close(mixed[row][real[row]], expected[row][real[row]], atol=1e-5, rtol=1e-5)
    inlay.use(model, "theirs")
    ids = batch(model, rows=2, padding="none", labels=False)
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "peft").eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**ids, **settings), again.generate(**ids, **settings))


def test_a_changed_tensor_or_setting_is_refused(tmp_path):
    write_theirs(
        "llama", "causal", peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), tmp_path / "x"
    )
    file = tmp_path / "x" / "adapter_config.json"
    config = json.loads(file.read_text())
    for settings, named in (({"num_virtual_tokens": 5}, "wrong shape"), ({"made_up": 1}, "made_up")):
        file.write_text(json.dumps(config | settings))
        with pytest.raises(FormatError, match=named):
            inlay.load(tiny("llama"), tmp_path / "x")
