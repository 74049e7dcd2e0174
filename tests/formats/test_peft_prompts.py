"""PEFT's folders of virtual tokens and prefixes, against PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
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
