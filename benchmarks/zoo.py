"""Tiny random models of every architecture that the installed transformers knows, made without naming one of them.

A configuration is shrunk by the names of its fields (`hidden_size`, `num_experts`, ...), nested ones too. Lists with one
entry per layer keep each distinct layer once, so that a hybrid model stays one. Where a shrunk configuration does
not build or run, gentler changes are tried before the class is given up.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

VOCAB, HIDDEN, HEADS, HEAD, WIDE = 128, 64, 4, 16, 96
MOST_PARAMETERS = 40_000_000

TEXT = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "mlm": "MODEL_FOR_MASKED_LM_MAPPING",
    "cls": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
}
OTHER = {
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "ctc": "MODEL_FOR_CTC_MAPPING",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}

# Whole field names as regular expressions and the new value; the first that fits counts.
LAYERS = r"(num_|n_)?(hidden_|(speech_|t2u_|text_)?encoder_|(speech_|t2u_|text_)?decoder_)?(layers?|blocks)|depth|num_layers_per_stack"
COARSE: tuple[tuple[str, Any], ...] = (
    (r"(\w+_)?vocab_size(_\w+)?", VOCAB),
    (r"encoder_hash_byte_group_vocab|num_hash_buckets|bucket_size|ngram_vocab_size_base", 211),
    (LAYERS, 2),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num|num_routed_experts)", 4),
    (r"\w*(num_experts_per_tok\w*|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts)", 2),
)
WIDTHS: tuple[tuple[str, Any], ...] = (
    (
        r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|n_inner|hidden_dim|dim_ff|mlp_dim)(_mlp|_global)?",
        WIDE,
    ),
    (
        r"(encoder_|cross_|backbone_|attention_|pooler_|out_|lru_|prediction_head_)?hidden_size(_global)?|lru_width",
        HIDDEN,
    ),
    (r"d_model|n_embd|dim|emb_dim|embed_dim|embedding_dim|embedding_size|word_embed_proj_dim|ple_embed_dim", HIDDEN),
    (r"max_(source_|target_|2d_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|model_max_length", 64),
    (r"original_max_position_embeddings", 32),
    (r"prediction_head_size", HIDDEN),
)
FINE: tuple[tuple[str, Any], ...] = (
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|num_global_key_value_heads", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"index_n_heads|linear_num_heads|linear_num_key_heads|heads_per_ngram", 2),
    (r"(\w+_)?(num_attention_heads|n_head|n_heads|num_heads|attention_heads|linear_num_value_heads)", HEADS),
    (r"qk_rope_head_dim", HEAD),
    (r"rotary_dim|qk_nope_head_dim", 8),
    (r"qk_head_dim", HEAD + 8),
    (r"(\w+_)?(head_dim|d_kv|kv_channels|d_head|head_size|dim_head)", HEAD),
    (r"(q|kv|o)_lora_rank|gated_norm_rank", 24),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups", 1),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|moe_layer_end_index", 1),
    (r"sliding_window|attention_window|local_attention|window_size|attention_chunk_size|sliding_window_size", 4),
    (r"(mamba_|ssm_)?(d_state|state_size)|time_step_rank|mamba_dt_rank", 8),
    (r"(mamba_)?chunk_size|index_topk", 8),
    (r"mamba_d_ssm", 128),
    (r"\w*(attn_layer_period|expert_layer_period|sparse_step|sliding_window_pattern)|layer_group_size", 2),
    (r"attn_layer_offset|expert_layer_offset|interleave_moe_layer_step", 1),
    (r"full_attention_interval|global_attn_every_n_layers|no_rope_layer_interval", 2),
    (r"coordinate_size", 12),
    (r"shape_size", 8),
    (r"image_size", 32),
    (r"patch_size|temporal_patch_size", 8),
)
PLANS = (COARSE + FINE + WIDTHS, COARSE + WIDTHS, COARSE + FINE, COARSE)
TOKEN = re.compile(r"\w*(token_ids?|token_index|mask_index|unk_index|lang_id)")


# Values that many classes leave unset although their model cannot be built without.
UNSET = {
    "vocab_size": VOCAB,
    "head_dim": HEAD,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

# What no rule can know: sizes that depend on each other, and defaults that transformers itself cannot run.
SPECIAL: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "EsmConfig": {"pad_token_id": 1},
    "EsmcConfig": {"num_key_value_heads": HEADS},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HrmTextConfig": {"num_hidden_layers": 16},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LiltConfig": {"hidden_size": 96},
    "Mamba2Config": {"num_heads": 8},
    "PerceiverConfig": {"d_latents": HIDDEN, "num_latents": 16, "num_self_attends_per_block": 2},
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds": False},  # axial ones train on rows of one length only
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16},
    "ZambaConfig": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "xLSTMConfig": {"hidden_size": 256, "embedding_dim": 256},
}


def classes(kinds: Mapping[str, str] = TEXT) -> dict[str, tuple[type[PretrainedConfig], str]]:
    """Every configuration class of some mappings once, by name, with the first kind of task that it has a model for."""
    return _classes(tuple(kinds.items()))


@functools.cache
def _classes(kinds: tuple[tuple[str, str], ...]) -> dict[str, tuple[type[PretrainedConfig], str]]:
    found: dict[str, tuple[type[PretrainedConfig], str]] = {}
    for kind, name in kinds:
        for config in getattr(modeling_auto, name):
            found.setdefault(config.__name__, (config, kind))
    return dict(sorted(found.items()))


def model_class(name: str, kinds: Mapping[str, str] = TEXT) -> type[nn.Module]:
    """The model class for a configuration class."""
    config_class, kind = classes(kinds)[name]
    found = getattr(modeling_auto, kinds[kind])[config_class]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def for_model(config: PretrainedConfig, model_class: type[nn.Module]) -> PretrainedConfig:
    """The part of a composite configuration that the model class takes."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs or {}]
    return next((part for part in parts if isinstance(part, wanted)), config)


def candidates(config_class: type[PretrainedConfig]) -> Iterator[PretrainedConfig]:
    """Shrunk configurations of a class, the smallest first.

    Raises:
        ValueError: not one of them is accepted by the class.
    """
    errors: list[str] = []
    good = 0
    for rules in PLANS:
        try:
            config = shrink(config_class, rules)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            good += 1
            yield config
    if not good:
        raise ValueError("; ".join(dict.fromkeys(errors)))


def shrink(config_class: type[PretrainedConfig], rules: tuple[tuple[str, Any], ...]) -> PretrainedConfig:
    """One configuration with the rules applied, nested ones first."""
    return config_class(**_changes(config_class(), rules))


def _changes(config: PretrainedConfig, rules: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    nested = {k: v for k in config.sub_configs or {} if isinstance(v := getattr(config, k, None), PretrainedConfig)}
    for key, sub in nested.items():
        if key in SPECIAL.get(type(config).__name__, {}):
            continue
        kept = {flag: True for flag in ("is_decoder", "add_cross_attention") if getattr(sub, flag, False)}
        changes[key] = {**kept, **_changes(sub, rules), "model_type": sub.model_type}
    fields = {k: v for k, v in config.to_dict().items() if k not in nested}
    changes |= SPECIAL.get(type(config).__name__, {})
    layers, lists = _layer_lists(config, fields)
    changes = lists | changes
    for key, value in fields.items():
        if value is None and key in UNSET:
            changes.setdefault(key, UNSET[key])
        if key in changes or isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int):
            new = next((new for rule, new in rules if re.fullmatch(rule, key)), None)
            if TOKEN.fullmatch(key) and value >= VOCAB:
                new = 3 + len([c for c in changes if TOKEN.fullmatch(c)])
            if re.fullmatch(LAYERS, key) and layers:
                new = layers
            if new is not None and value > new:
                changes[key] = new
        elif isinstance(value, list) and TOKEN.fullmatch(key) and any(isinstance(i, int) and i >= VOCAB for i in value):
            changes[key] = [2]
    if fields.get("kv_lora_rank"):
        changes["num_key_value_heads"] = changes.get("num_attention_heads", fields.get("num_attention_heads"))
    return changes


def _layer_lists(config: PretrainedConfig, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The number of layers to keep and, for every list with one entry per layer, the entries of those layers."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and isinstance(count, int) and len(v) == count > 2}
    lists = {k: v for k, v in lists.items() if all(isinstance(i, str | int | float) for i in v)}
    if not lists:
        pattern = [v for k, v in fields.items() if k == "block_types" and isinstance(v, list)]
        return (len(pattern[0]) if pattern else 0), {}
    first: dict[Any, int] = {}
    for i, kinds in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(kinds, i)
    kept = list(first.values())[:6]
    kept += [kept[-1]] * (2 - len(kept))
    # Layers that share something with earlier ones of their kind need two of each kind.
    shares = fields.get("num_kv_shared_layers") or "hybrid" in str(lists)
    made: dict[str, Any] = {"num_kv_shared_layers": len(kept)} if fields.get("num_kv_shared_layers") else {}
    kept = kept * 2 if shares else kept
    return len(kept), made | {k: [v[i] for i in kept] for k, v in lists.items()}


def inputs_for(kind: str, model: nn.Module) -> dict[str, Any]:
    """Two rows of eight tokens (or a small image or sound), the same for the same model."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        size = getattr(config, "image_size", 32)
        size = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), *size, generator=generator)}
    if kind == "speech":
        return _speech(model, generator)
    if kind in ("audio", "ctc"):
        if model.main_input_name == "input_features":
            bins = getattr(config, "num_mel_bins", getattr(config, "feature_projection_input_dim", 80))
            return {"input_features": torch.randn(2, 100, bins, generator=generator)}
        return {"input_values": torch.randn(2, 4000, generator=generator)}
    text = config.get_text_config()
    # Musicgen folds its codebooks into the rows.
    rows = 2 * config.num_codebooks if "musicgen" in config.model_type else 2
    ids = torch.randint(5, min(VOCAB, getattr(text, "vocab_size", None) or VOCAB), (rows, 8), generator=generator)
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int) and kind == "cls":
        ids[:, -1] = eos
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if kind == "seq2seq" or (config.is_encoder_decoder and kind in ("causal", "mlm")):
        inputs["decoder_input_ids"] = ids[:, :6]
    return inputs


def _speech(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    """Sound and six tokens for a speech recogniser, in the first form that it takes."""
    config: Any = model.config
    audio = getattr(config, "audio_config", config)
    names = ("num_mel_bins", "input_feat_per_channel")
    bins = next((n for k in names if isinstance(n := getattr(audio, k, None), int)), 80)
    frames = 2 * int(getattr(audio, "max_source_positions", None) or 50)
    vocab = min(VOCAB, getattr(config.get_text_config(), "vocab_size", VOCAB))
    ids = torch.randint(5, vocab, (2, 6), generator=generator)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "input_features": ((2, bins, frames), (2, 100, bins), (2, bins, 100)),
        "input_values": ((2, 4000), (2, 1, 4000)),
    }
    for name, forms in shapes.items():
        for shape in forms:
            inputs = {name: torch.randn(shape, generator=generator), "decoder_input_ids": ids}
            with contextlib.suppress(Exception), torch.no_grad():
                model(**inputs)
                return inputs
    return {"input_ids": ids}


def build(name: str, kinds: Mapping[str, str] = TEXT) -> nn.Module:
    """A tiny random model of a class in evaluation mode, always with the same weights, that runs on `inputs_for`.

    Raises:
        ValueError: no shrunk configuration builds, or none runs.
    """
    config_class, kind = classes(kinds)[name]
    made = model_class(name, kinds)
    errors: list[str] = []
    for config in candidates(config_class):
        try:
            config = for_model(config, made)
            if kind == "cls" and getattr(config.get_text_config(), "pad_token_id", None) is None:
                config.get_text_config().pad_token_id = config.pad_token_id = 0
            if kind == "cls" and config.is_encoder_decoder and not hasattr(config, "decoder_start_token_id"):
                config.decoder_start_token_id = 0
            with torch.device("meta"):
                size = sum(p.numel() for p in made(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = made(config).eval()
            with torch.no_grad():
                model(**inputs_for(kind, model))
                _roughen(model)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            return model
    raise ValueError("; ".join(dict.fromkeys(errors)))


def _roughen(model: nn.Module) -> None:
    """Norms and biases away from one and zero, and no weight all zero, so that what they do shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.ndim == 1 or not parameter.any()):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)
