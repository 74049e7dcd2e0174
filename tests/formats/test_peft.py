"""PEFT's folders against PEFT itself: its folders give its logits here, ours give our logits there."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inlay
from comparing import bits, logits, randomise, same_bits
from inlay.errors import FormatError
from tiny import batch, tiny

peft = pytest.importorskip("peft")

TASKS = {"cls": "SEQ_CLS", "token": "TOKEN_CLS", "seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}


def fill(model: nn.Module, names: tuple[str, ...] = ("lora_", "ia3_", "prompt_encoder", "modules_to_save")) -> None:
    """Random values in every tensor that PEFT saves; initial ones would prove nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(n in name for n in names) or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def theirs(family: str, task: str | None, config: Any, folder: Path, *, ours: dict[str, Any] | None = None) -> Tensor:
    """Writes a PEFT folder with random tensors and returns PEFT's logits for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny(family, task, **(ours or {})), config).eval()
        fill(model)
        model.save_pretrained(folder)
    return logits_of(model)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch(model.get_base_model())).logits


def in_peft(family: str, task: str | None, folder: Path, *, ours: dict[str, Any] | None = None) -> Tensor:
    """What PEFT computes with a folder that inlay wrote. A warning of a missing or unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = peft.PeftModel.from_pretrained(tiny(family, task, **(ours or {})), folder).eval()
    return logits_of(model)


LORA: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", None, {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("llama", None, {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"]}),
    "dora": ("llama", None, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "dora and bias": ("bert", "cls", {"r": 4, "use_dora": True, "target_modules": ["query", "output.dense"]}),
    "dora on fused conv1d": (
        "gpt2",
        None,
        {"r": 4, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "fused": ("gpt2", None, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("bert", "mlm", {"r": 4, "target_modules": ["word_embeddings", "query"]}),
    "dora embedding": ("bert", "mlm", {"r": 4, "use_dora": True, "target_modules": ["word_embeddings", "query"]}),
    "bias all": ("bert", "cls", {"r": 4, "bias": "all", "target_modules": ["query"]}),
    "bias lora_only": ("bert", "cls", {"r": 4, "bias": "lora_only", "target_modules": ["query", "key"]}),
    "patterns": (
        "llama",
        None,
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 5},
        },
    ),
    "layers": ("llama", None, {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "regex": ("llama", None, {"r": 4, "target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\..*_proj)"}),
    "excluded": (
        "llama",
        None,
        {"r": 4, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "all linear": ("gpt_neox", None, {"r": 4, "target_modules": "all-linear"}),
    "head": ("roberta", "cls", {"r": 4, "target_modules": ["query"]}),
    "token head": ("bert", "token", {"r": 4, "target_modules": ["value"]}),
    "modules to save": ("llama", None, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tied head": (
        "gpt2",
        None,
        {"r": 4, "target_modules": ["c_proj"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
    ),
    "encoder and decoder": ("t5", None, {"r": 4, "target_modules": ["q", "wo"]}),
    "bart": ("bart", "cls", {"r": 4, "target_modules": ["q_proj", "fc2"], "modules_to_save": ["classification_head"]}),
}


@pytest.mark.parametrize("case", LORA)
def test_lora_from_peft_and_back(case, tmp_path):
    family, task, settings = LORA[case]
    config = peft.LoraConfig(task_type=TASKS.get(task or "causal"), **settings)
    config.task_type = TASKS.get(task) if task else ("SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    there_and_back(family, task, config, tmp_path)


def there_and_back(family: str, task: str | None, config: Any, tmp_path: Path, **ours: Any) -> inlay.Adapter:
    expected = theirs(family, task, config, tmp_path / "peft", ours=ours)
    model = tiny(family, task, **ours)
    plain, before = logits(model), bits(model)
    assert not torch.allclose(expected, plain, atol=1e-2), "the adapter does nothing, so nothing is proven"
    adapter = inlay.load(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours", format="peft")
    adapter.save(tmp_path / "again", format="peft")
    for file in (tmp_path / "ours").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    torch.testing.assert_close(in_peft(family, task, tmp_path / "ours", ours=ours), expected, atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert same_bits(model, before)
    return adapter
