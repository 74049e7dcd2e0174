"""Tiny random models of the families that tests run on, and batches for them.

    from tiny import FAMILIES, batch, tiny

    model = tiny("llama")                  # LlamaForCausalLM, 2 layers, eval mode, always the same weights
    model = tiny("bert", "token", dropout=0.1)
    loss = model(**batch(model)).loss

The weights differ from what transformers initialises so that a wrong implementation shows: matrices are large
enough for attention to be far from uniform, and biases and norms are not zero and one. Sizes differ from each
other (hidden 32, FFN 48, query heads 64 in Qwen 3, half as many key as query heads where possible), so that
a mixed-up shape fails instead of broadcasting.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from torch import Tensor

Task = Literal["causal", "cls", "token", "seq2seq", "mlm"]

VOCAB = 100
LABELS = 3

_AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "cls": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "mlm": transformers.AutoModelForMaskedLM,
}

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

_CONFIGS: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _LLAMA),
    "mistral": (transformers.MistralConfig, _LLAMA | {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2Config, _LLAMA),
    "qwen3": (transformers.Qwen3Config, _LLAMA | {"head_dim": 16}),
    "gpt2": (
        transformers.GPT2Config,
        {
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.15,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, _BERT),
    "opt": (
        transformers.OPTConfig,
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "init_std": 0.15,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "bert": (transformers.BertConfig, _BERT),
    "roberta": (transformers.RobertaConfig, _BERT | {"pad_token_id": 1, "bos_token_id": 0}),
    "modernbert": (
        transformers.ModernBertConfig,
        _BERT
        | {
            "local_attention": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "t5": (
        transformers.T5Config,
        {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        transformers.BartConfig,
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "init_std": 0.15,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
}

_DECODER: tuple[Task, ...] = ("causal", "cls", "token")
_ENCODER: tuple[Task, ...] = ("cls", "token", "mlm")
TASKS: dict[str, tuple[Task, ...]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gpt2": _DECODER,
    "gpt_neox": _DECODER,
    "opt": ("causal", "cls"),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "modernbert": _ENCODER,
    "t5": ("seq2seq", "cls", "token"),
    "bart": ("seq2seq", "cls"),
}
"""What each family can do; its first task is the one `tiny` builds when none is named."""

FAMILIES = tuple(TASKS)
CASES = tuple((family, task) for family, tasks in TASKS.items() for task in tasks)


def tiny(
    family: str,
    task: Task | None = None,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    attn: str | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> transformers.PreTrainedModel:
    """A random model in eval mode; the same arguments give the same weights and leave the global RNG alone.

    Args:
        family: one of `FAMILIES`.
        task: one of `TASKS[family]`, its first one when None.
        dropout: the value of every dropout probability of the configuration (layer drop stays 0).
        seed: of the weights.
        attn: the attention implementation ("eager", "sdpa", ...), the library's choice when None.
        dtype: of the finished model.
        config: further configuration keys, which win over the family's.
    """
    made, keys = _CONFIGS[family]
    built = made(**({"vocab_size": VOCAB, "num_labels": LABELS} | keys | config))
    for key, value in built.to_dict().items():
        if "drop" in key and "layerdrop" not in key and isinstance(value, float):
            setattr(built, key, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _AUTO[task or TASKS[family][0]].from_config(built, attn_implementation=attn)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(dtype).eval()


def batch(
    model: torch.nn.Module,
    rows: int = 3,
    length: int = 9,
    *,
    seed: int = 0,
    padding: Literal["right", "left", "none"] = "right",
    labels: bool = True,
) -> dict[str, Tensor]:
    """Inputs [rows, length] for `model` with labels for its task, the same for the same arguments.

    Row i has two tokens fewer than row i - 1 (never fewer than 3; then it starts again), the rest is padding
    with attention mask 0 and label -100. In encoder-decoders every row ends with the end token.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    shorter = 0 if padding == "none" else 2
    lengths = [max(min(3, length), length - shorter * i % max(1, length - 2)) for i in range(rows)]
    positions = torch.arange(length)
    if padding == "left":
        positions = positions.flip(0)
    mask_BT = (positions < torch.tensor(lengths)[:, None]).long()
    real_BT = mask_BT.bool()

    # Ids below 5 stand for special tokens in every family here.
    ids_BT = torch.randint(5, config.vocab_size, (rows, length), generator=generator)
    if config.is_encoder_decoder:
        last = torch.tensor(lengths) - 1 if padding != "left" else torch.full((rows,), length - 1)
        ids_BT[torch.arange(rows), last] = config.eos_token_id
    ids_BT[~real_BT] = config.pad_token_id
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if labels:
        inputs["labels"] = _labels(model, ids_BT, real_BT, generator)
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _labels(model: torch.nn.Module, ids_BT: Tensor, real_BT: Tensor, generator: torch.Generator) -> Tensor:
    config: Any = model.config
    # Hosts may swap the class for a subclass of its own, so the bases are asked too.
    names = " ".join(base.__name__ for base in type(model).__mro__)
    rows, length = ids_BT.shape
    if "ForSequenceClassification" in names:
        return torch.randint(0, config.num_labels, (rows,), generator=generator)
    if "ForTokenClassification" in names:
        labels_BT = torch.randint(0, config.num_labels, (rows, length), generator=generator)
    elif config.is_encoder_decoder:
        labels_BT = torch.randint(5, config.vocab_size, (rows, length), generator=generator)
    elif "ForMaskedLM" in names:
        labels_BT = ids_BT.clone()
        labels_BT[:, 1::2] = -100
    else:
        labels_BT = ids_BT.clone()
    return labels_BT.masked_fill(~real_BT, -100)
