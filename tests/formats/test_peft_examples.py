"""The folders that PEFT 0.21 wrote for each of its methods: read with equal logits, or refused by name."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import inlay
from inlay.errors import FormatError

peft = pytest.importorskip("peft")

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 128,
}  # fmt: skip
READ = {
    "lora": "llama",
    "lora_dora_bias_embed": "bert",
    "adalora": "llama",
    "ia3": "llama",
    "ln_tuning": "llama",
    "multi": "llama",
    "multi/other": "llama",
    "p_tuning": "llama",
    "prefix": "llama",
    "prefix_bert": "bert",
    "prefix_gqa_proj": "gqa",
    "prompt_tuning": "llama",
    "prompt_tuning_t5": "t5",
}
REFUSED = {
    "adaption_prompt": "LLaMA-Adapter",
    "boft": "BOFT",
    "loha": "LoHa",
    "lokr": "LoKr",
    "mpt": "multitask",
    "oft": "OFT",
    "vera": "VeRA",
    "lora_modules_to_save_tok": "trainable_token_indices",
}


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0)
        ).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2 if kind == "gqa" else 4, pad_token_id=0)).eval()


def run(model: nn.Module, kind: str) -> Tensor:
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


@pytest.fixture
def examples(shared: Path) -> Path:
    path = shared / "vectors" / "peft_checkpoints"
    if not path.is_dir():
        pytest.skip(f"no PEFT folders in {path}")
    return path


@pytest.mark.parametrize("name", READ)
def test_every_tensor_random_and_equal_logits(name, examples, tmp_path):
    folder, kind = tmp_path / "filled", READ[name]
    folder.mkdir()
    shutil.copy(examples / name / "adapter_config.json", folder)
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(examples / name / "adapter_model.safetensors")
    # An embedding's own weight is written along, and is the base's.
    kept = {n for n in tensors if n.endswith("word_embeddings.base_layer.weight")}
    filled = {n: t if n in kept else torch.randn(t.shape, generator=generator) * 0.2 for n, t in tensors.items()}
    model = base(kind)
    for key in kept:
        filled[key] = model.get_parameter(key.removeprefix("base_model.model.").replace(".base_layer", "")).detach()
    save_file(filled, folder / "adapter_model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run(peft.PeftModel.from_pretrained(base(kind), folder).eval(), kind)
    plain = run(model, kind)
    inlay.load(model, folder)
    found = run(model, kind)
    assert not torch.allclose(found, plain, atol=1e-3)
    expected = expected[:, -found.shape[1] :] if expected.ndim == 3 else expected
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named(name, examples):
    with pytest.raises(FormatError, match=REFUSED[name]):
        inlay.load(base("llama"), examples / name)


def test_a_prefix_with_relative_biases_is_refused(examples):
    with pytest.raises(FormatError, match="relative biases"):
        inlay.load(base("t5"), examples / "prefix_t5")


def test_every_example_is_spoken_of(examples):
    folders = {str(p.parent.relative_to(examples)) for p in examples.rglob("adapter_config.json")}
    assert folders == {*READ, *REFUSED, "prefix_t5"}
