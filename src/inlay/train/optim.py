"""Optimizers by name, and parameter groups (decay, LoRA+)."""

from __future__ import annotations

from typing import Any

import torch

from inlay.config import RunConfig


def parameter_groups(adapter: Any, config: RunConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: matrices decay, vectors do not; LoRA+ gives every B its own learning rate.

    Raises:
        MethodError: `loraplus_lr_ratio` without any LoRA matrix B.
    """
    rate = config.learning_rate
    assert rate is not None, "the configuration was not resolved"
    rates = _rates(adapter, rate, config.loraplus_lr_ratio)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in adapter.parameters():
        decays = parameter.ndim >= 2
        own = rates.get(id(parameter), rate)
        decay = (config.weight_decay or 0.0) if decays else 0.0
        group = groups.setdefault((decays, own), {"params": [], "lr": own, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _rates(adapter: Any, rate: float, ratio: float | None) -> dict[int, float]:
    if ratio is None:
        return {}
    from inlay.methods.lora import param_groups

    return {id(p): group["lr"] for group in param_groups(adapter, rate, ratio) for p in group["params"]}


def build_optimizer(adapter: Any, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` names, over the adapter's parameters.

    Raises:
        ConfigError: an optimizer whose library is not installed.
    """
    groups = parameter_groups(adapter, config)
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
        case name:
            from inlay.train.paged import make_adamw

            return make_adamw(name, groups, **adam)


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
