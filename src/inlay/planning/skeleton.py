"""Models without weights: built from a configuration, or copied from a model that is there, on the meta device."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inlay.config import RunConfig
from inlay.errors import ConfigError, nearest
from inlay.train.models import AUTO, kind_of, load_config

M = TypeVar("M", bound=nn.Module)

USUAL_TASK = {"encoder": "sequence-classification", "decoder": "causal-lm", "encoder-decoder": "seq2seq"}
"""What a model is mostly trained for, by its kind."""


def config_of(model: Any, revision: str | None = None) -> Any:
    """The configuration of a model by name or folder; a configuration is taken as it is.

    Raises:
        ConfigError: there is no such model.
    """
    return load_config(RunConfig(model=model, data="", revision=revision)) if isinstance(model, str) else model


def task_of(model_config: Any, task: str | None) -> str:
    """The task that is planned for.

    Raises:
        ConfigError: it is not known.
    """
    if task is not None and task not in AUTO:
        raise ConfigError(f"task is {task!r}; {nearest(task, AUTO)}")
    return task or USUAL_TASK[kind_of(model_config)]


def empty_model(model_config: Any, task: str, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration with the head for a task, without weights.

    Raises:
        ConfigError: the model has no such head.
    """
    import transformers

    auto = getattr(transformers, AUTO[task])
    try:
        with torch.device("meta"), _silent():
            model: nn.Module = auto.from_config(copy.deepcopy(model_config), dtype=dtype)
            model.tie_weights()  # type: ignore[operator]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"model: a {model_config.model_type} cannot be built for {task}: {error}") from error
    return model


def twin(model: M) -> M:
    """A copy of a model on the meta device: its modules, adapters and hosts, none of its values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter.detach(), device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """The size of a safetensors file that holds these tensors: a header in JSON, padded to 8 bytes, then the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-text // 8) * 8 + at


_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
