"""Activations computed again in the backward pass, under the name that this version of transformers has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = {"use_reentrant": False}
"""The form of torch's checkpointing that adapters inside a frozen block need: gradients reach what has them."""


def turn_on(model: Any, settings: Mapping[str, Any] | None = None) -> None:
    """Checkpoint the blocks of a model of transformers.

    Args:
        model: the model; 5.23 has renamed `gradient_checkpointing_enable`, which warns since.
        settings: further arguments of `torch.utils.checkpoint.checkpoint`.
    """
    keys = {**PLAIN, **(settings or {})}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=keys)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keys)


def turn_off(model: Any) -> None:
    """The reverse of `turn_on`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
