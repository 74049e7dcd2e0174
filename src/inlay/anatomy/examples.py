"""A few tokens, pixels or samples that a model of transformers accepts, made from its config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 5


def candidates(model: nn.Module) -> list[dict[str, Any]]:
    """Keyword arguments of one forward pass, the likeliest first.

    Raises:
        TypeError: the model has no `config`, so nobody but its author knows what to feed it.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"{type(model).__name__} has no config, so it is not known what to feed it: pass an example")
    made = [_text(model, config)] if _has_text(model, config) else []
    made += _other(model, config)
    # Some models want as many rows as they have codebooks.
    rows = getattr(config, "num_codebooks", 1)
    if isinstance(rows, int) and rows > 1 and made:
        made.append({name: t.repeat(rows, 1) if t.ndim == 2 else t for name, t in made[0].items()})
    parameters = inspect.signature(model.forward).parameters
    cached = {"use_cache": False} if "use_cache" in parameters or hasattr(config, "use_cache") else {}
    return [inputs | cached for inputs in made] + [dict(inputs) for inputs in made if cached]


def _has_text(model: nn.Module, config: Any) -> bool:
    return getattr(model, "main_input_name", "input_ids") in ("input_ids", "inputs") or hasattr(config, "vocab_size")


def _text(model: nn.Module, config: Any) -> dict[str, Tensor]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 2
    special = {i for name in ("pad_token_id", "bos_token_id", "eos_token_id") for i in _ids(getattr(text, name, None))}
    plain = [i for i in range(min(int(vocab), 64)) if i not in special] or [0]
    ids = [plain[i % len(plain)] for i in range(TOKENS)]
    # Some classifiers read the sentence at its end token.
    ends = [i for i in _ids(getattr(config, "eos_token_id", None)) if 0 <= i < int(vocab)]
    ids[-1:] = ends[:1] or ids[-1:]
    tokens = torch.tensor([ids], device=device_of(model))
    name = "inputs" if getattr(model, "main_input_name", "") == "inputs" else "input_ids"
    inputs = {name: tokens}
    if (
        getattr(config, "is_encoder_decoder", False)
        and "decoder_input_ids" in inspect.signature(model.forward).parameters
    ):
        inputs["decoder_input_ids"] = tokens if _reads_end(model) else tokens[:, : TOKENS - 1]
    return inputs


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)]


def _reads_end(model: nn.Module) -> bool:
    return "SequenceClassification" in type(model).__name__


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _other(model: nn.Module, config: Any) -> list[dict[str, Tensor]]:
    """Pixels or samples, for models whose main input they are."""
    name, device = getattr(model, "main_input_name", ""), device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def noise(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if name in ("pixel_values", "inputs"):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        return [{name: noise(1, int(getattr(vision, "num_channels", 3)), height, width)}]
    if name == "input_values":
        return [{name: noise(1, 4000)}, {name: noise(1, 16000)}]
    if name == "input_features":
        audio = getattr(config, "audio_config", config)
        bins = int(getattr(audio, "num_mel_bins", None) or getattr(audio, "feature_projection_input_dim", 80) or 80)
        frames = 2 * int(getattr(audio, "max_source_positions", 50))
        decoder = {"decoder_input_ids": torch.ones(1, TOKENS, dtype=torch.long, device=device)}
        decoder = decoder if getattr(config, "is_encoder_decoder", False) else {}
        return [{name: noise(1, bins, frames), **decoder}, {name: noise(1, 100, bins), **decoder}]
    return []
