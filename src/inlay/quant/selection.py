"""Which layers of a model are quantised, and how that is written into its `config.json`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inlay.errors import QuantizationError, nearest
from inlay.quant.base import BlockQuantization
from inlay.quant.linear import Linear4

_LINEAR = (nn.Linear, Conv1D, Linear4)

# Dense parameters beyond embeddings, heads and what was skipped on purpose: above this share a warning says so.
_UNEXPECTED_DENSE = 0.05


def matches(pattern: str, name: str) -> bool:
    """Whether a skip pattern names a module. The rule is that of transformers, which reads the same list."""
    at_start = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None
    return at_start or name.endswith(pattern)


def select(model: nn.Module, config: BlockQuantization) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers to quantise, by path, and the skip patterns that say the same to transformers.

    Raises:
        QuantizationError: a pattern matches no linear layer, the tied head was asked for, or nothing is left.
    """
    linears = {name: m for name, m in model.named_modules() if type(m) in _LINEAR}
    hosting = [name for name, m in model.named_modules() if "inlay" in m._modules]
    if hosting:
        raise QuantizationError(
            f"{hosting[0]} carries an adapter, and a base is quantised before adapters are attached; detach first"
        )
    tied = _tied_modules(model)
    if config.skip is None:
        dense = [name for name in linears if name in tied or name in _heads(model)]
        skip = _patterns(dense, linears)
    else:
        skip = list(config.skip)
        for pattern in skip:
            if not any(matches(pattern, name) for name in linears):
                raise QuantizationError(f"skip={pattern!r} names no linear layer; {nearest(pattern, linears)}")
        shared = [name for name in linears if name in tied and not any(matches(p, name) for p in skip)]
        if shared:
            raise QuantizationError(
                f"{shared[0]} is tied to an embedding, which stays dense, so it cannot be quantised; "
                f"add it to skip: skip={(*config.skip, shared[0])!r}"
            )
    always = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    chosen = {n: m for n, m in linears.items() if not any(matches(p, n) for p in (*skip, *always))}
    if not chosen:
        raise QuantizationError(
            f"nothing to quantise in {type(model).__name__}: of {len(linears)} linear layers all are skipped"
        )
    return chosen, skip


def _heads(model: nn.Module) -> set[str]:
    """Paths of everything after the base model: output embeddings and task heads. Empty for other modules."""
    if not isinstance(model, PreTrainedModel):
        return set()
    heads = {id(model.get_output_embeddings())}
    base = model.base_model
    if base is not model:
        inside = {id(m) for m in base.modules()}
        heads |= {id(m) for m in model.modules() if id(m) not in inside}
    return {name for name, m in model.named_modules() if id(m) in heads}


def _tied_modules(model: nn.Module) -> set[str]:
    """Paths of modules that share a parameter with an embedding."""
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    tied = {
        name
        for name, m in model.named_modules()
        if not isinstance(m, nn.Embedding) and any(id(p) in embedded for p in m.parameters(recurse=False))
    }
    # On the meta device, while loading, nothing is shared yet and the declaration counts.
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        tied |= {key.rpartition(".")[0] for key in pair}
    return tied


def _patterns(dense: list[str], linears: Iterable[str]) -> list[str]:
    """Names for a skip list; anchored where the plain name is also the end of another layer's."""
    wrong = {p for p in dense for name in linears if matches(p, name) and name not in dense}
    return [f"^{re.escape(name)}$" if name in wrong else name for name in dense]


def dense_patterns(model: nn.Module) -> list[str]:
    """Skip patterns for the linear layers that are dense now."""
    linears = {name: type(m) for name, m in model.named_modules() if type(m) in _LINEAR}
    return _patterns([name for name, cls in linears.items() if cls is not Linear4], linears)


def config_entry(model: nn.Module, config: BlockQuantization, skip: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json with which transformers and bitsandbytes load the checkpoint."""
    dtype = config.compute_dtype or str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": config.storage,
        "llm_int8_skip_modules": skip,
    }


def warn_about_dense_rest(model: nn.Module, skip: list[str]) -> None:
    """Say what stays dense although nobody asked for it: fused experts, linear layers of other classes."""
    counted: dict[str, int] = {}
    total = 0
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            total += parameter.numel() * (2 if type(module) is Linear4 and key == "weight" else 1)
            if (
                not isinstance(module, (*_LINEAR, nn.Embedding))
                and _is_matrix(parameter)
                and not any(matches(p, name) for p in skip)
            ):
                path = f"{name}.{key} ({type(module).__name__})"
                counted[path] = parameter.numel()
    dense = sum(counted.values())
    if dense > _UNEXPECTED_DENSE * total:
        largest = max(counted, key=lambda path: counted[path])
        warnings.warn(
            f"{dense / total:.0%} of the parameters stay dense because they are in no nn.Linear, "
            f"the largest in {largest}",
            stacklevel=3,
        )


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and parameter.is_floating_point()
