"""Optimizers by name, and parameter groups (decay, rates of heads and those that methods fix, LoRA+)."""

from __future__ import annotations

from typing import Any

import torch

from inlay.config import RunConfig
from inlay.train.head_rate import head_parameters


def parameter_groups(adapter: Any, config: RunConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer, those at the run's own learning rate first, since that is the rate that is logged.

    Matrices decay, vectors and what a method keeps from it (`Piece.undecayed`) do not. The task head has a rate of its
    own, a method may fix that of some of its parameters (`Piece.learning_rates`), and LoRA+ gives every B its own.

    Raises:
        MethodError: `loraplus_lr_ratio` without any LoRA matrix B.
    """
    rate = config.learning_rate
    assert rate is not None, "the configuration was not resolved"
    rates, spared = _rates(adapter, rate, config), _spared(adapter)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in adapter.parameters():
        decays = parameter.ndim >= 2 and id(parameter) not in spared
        own = rates.get(id(parameter), rate)
        decay = (config.weight_decay or 0.0) if decays else 0.0
        group = groups.setdefault((decays, own), {"params": [], "lr": own, "weight_decay": decay})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["lr"] != rate)


def _rates(adapter: Any, rate: float, config: RunConfig) -> dict[int, float]:
    head, ratio = config.head_learning_rate, config.loraplus_lr_ratio
    rates = {} if head is None else {id(p): head for p in head_parameters(adapter)}
    rates |= {
        id(piece.get_parameter(name)): fixed
        for piece in getattr(adapter, "pieces", {}).values()
        for name, fixed in piece.learning_rates().items()
    }
    if ratio is not None:
        from inlay.methods.lora import param_groups

        for group in param_groups(adapter, rate, ratio):
            rates |= {id(p): group["lr"] for p in group["params"] if group["lr"] != rate}
    return rates


def _spared(adapter: Any) -> set[int]:
    """The parameters that a method keeps from weight decay."""
    pieces = getattr(adapter, "pieces", {}).values()
    return {id(piece.get_parameter(name)) for piece in pieces for name in piece.undecayed()}


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
