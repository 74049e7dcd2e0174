"""Optimizers by name, and parameter groups (decay, LoRA+)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from inlay.config import RunConfig
from inlay.errors import ConfigError

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def parameter_groups(named: NamedParameters, config: RunConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: matrices decay, vectors do not; LoRA+ gives every B its own learning rate.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354): lr(B) = ratio · lr(A).

    Raises:
        ConfigError: `loraplus_lr_ratio` without any LoRA matrix B.
    """
    rate, ratio = config.learning_rate, config.loraplus_lr_ratio
    assert rate is not None, "the configuration was not resolved"
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in named:
        decays = parameter.ndim >= 2
        raised = ratio is not None and _is_lora_b(name)
        group = groups.setdefault(
            (decays, raised),
            {
                "params": [],
                "lr": rate * (ratio if raised and ratio is not None else 1.0),
                "weight_decay": (config.weight_decay or 0.0) if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    if ratio is not None and not any(raised for _, raised in groups):
        raise ConfigError("loraplus_lr_ratio: the method has no LoRA matrices B to give another learning rate to")
    return list(groups.values())


def _is_lora_b(name: str) -> bool:
    return name.rpartition(".")[2] in ("B", "lora_B") or name.endswith(".B.weight")


def build_optimizer(named: NamedParameters, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` names, over the adapter's parameters.

    Raises:
        ConfigError: an optimizer whose library is not installed.
    """
    groups = parameter_groups(named, config)
    adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    match config.optim:
        case "adamw_torch":
            return torch.optim.AdamW(groups, **adam)  # type: ignore[arg-type]
        case "adamw_torch_fused":
            return torch.optim.AdamW(groups, fused=_can_fuse(groups), **adam)  # type: ignore[arg-type]
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.adam_beta1)
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(groups, scale_parameter=False, relative_step=False)
        case "adamw_8bit":
            try:
                bitsandbytes: Any = importlib.import_module("bitsandbytes")
            except ImportError:
                raise ConfigError("optim: adamw_8bit needs bitsandbytes: pip install 'inlay[bnb]'") from None
            return bitsandbytes.optim.AdamW8bit(groups, **adam)  # type: ignore[no-any-return]
        case paged:
            from inlay.train.paged import PagedAdamW

            bits = 8 if paged.endswith("8bit") else 32
            settings = {**adam, "bits": bits} if "bits" in inspect.signature(PagedAdamW).parameters else adam
            return PagedAdamW(groups, **settings)  # type: ignore[no-any-return]


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    return all(
        p.device.type in ("cpu", "cuda") and p.dtype in (torch.float32, torch.bfloat16, torch.float16)
        for group in groups
        for p in group["params"]
    )


def warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Steps over which the learning rate rises."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round((config.warmup_ratio or 0.0) * total_steps)
