"""What `accelerate launch` asks for beside the configuration: it speaks through environment variables.

FSDP and mixed precision become keys of the configuration. DeepSpeed's settings are read here and taken apart: what
shares out the frozen base is done (`zero.py`), what inlay does itself must agree with the configuration, and what would
have no effect is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.config import RunConfig
from inlay.errors import ConfigError

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
HARMLESS = {
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "prescale_gradients", "gradient_predivide_factor", "communication_data_type",
}  # fmt: skip
"""Keys of a DeepSpeed configuration that say how its own optimizer works or what it prints."""


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed was asked for.

    Attributes:
        stage: 0 to 3. From 3 on the frozen weights are shared out; below, nothing that an adapter has much of.
        settings: the section `zero_optimization` of its configuration.
    """

    stage: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def launched(config: RunConfig) -> tuple[RunConfig, Zero | None]:
    """The configuration with what the launcher adds to it, and what it wants of DeepSpeed.

    Raises:
        ConfigError: both FSDP and DeepSpeed are wanted, or settings of DeepSpeed that contradict the configuration or
            would have no effect.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "bf16" and config.bf16 is None and not config.fp16:
        config = config.model_copy(update={"bf16": True})
    if precision == "fp16" and config.bf16 is None:
        config = config.model_copy(update={"fp16": True})
    if _on(FSDP):
        config = config.model_copy(update={"fsdp": True})
    if not _on(DEEPSPEED):
        return config, None
    if config.fsdp:
        raise ConfigError("fsdp: DeepSpeed is asked for too, by the launcher; the base is shared out by one of the two")
    document = _document()
    return _agreeing(config, document), _zero(document)


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Within it, accelerate opens its processes without DeepSpeed's engine, which would take the loop over."""
    before = os.environ.pop(DEEPSPEED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[DEEPSPEED] = before


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _document() -> dict[str, Any]:
    """DeepSpeed's configuration: the file that was named, or what single flags say."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file not in ("", "none"):
        try:
            document = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"DeepSpeed's configuration {file} cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise ConfigError(f"DeepSpeed's configuration {file} holds no object")
        return document
    section: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("param", "optimizer"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            section[f"offload_{part}"] = {"device": device}
    document = {"zero_optimization": section}
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        document["gradient_accumulation_steps"] = int(accumulation)
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        document["gradient_clipping"] = float(clipping)
    return document


def _agreeing(config: RunConfig, document: Mapping[str, Any]) -> RunConfig:
    """The configuration, with the precision that DeepSpeed's asks for.

    Raises:
        ConfigError: a value that contradicts the configuration, or a section without effect.
    """
    same = {
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_clipping": config.max_grad_norm,
    }
    names = {"train_micro_batch_size_per_gpu": "per_device_train_batch_size", "gradient_clipping": "max_grad_norm"}
    for key, value in document.items():
        if key in same:
            if value not in ("auto", same[key]):
                key_here = names.get(key, key)
                raise ConfigError(
                    f"DeepSpeed's configuration says {key}: {value}, the run {key_here}: {same[key]}; say the same in "
                    f'both, or "auto" there'
                )
        elif key in ("bf16", "fp16"):
            wanted = value.get("enabled") if isinstance(value, dict) else value
            if wanted is True:
                if (config.fp16 if key == "bf16" else config.bf16) or (key == "bf16" and config.bf16 is False):
                    raise ConfigError(f"DeepSpeed's configuration asks for {key}, and the run for another precision")
                config = config.model_copy(update={key: True})
        elif key not in HARMLESS | {"zero_optimization", "train_batch_size"} and value not in ("auto", {}, None, False):
            raise ConfigError(
                f"DeepSpeed's configuration has the section {key!r}, which has no effect in inlay train: optimizer, "
                "schedule and activations are inlay's. Set them in the run's configuration and leave the section out."
            )
    return config


def _zero(document: Mapping[str, Any]) -> Zero:
    section = document.get("zero_optimization") or {}
    stage = section.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"DeepSpeed's configuration says stage {stage!r}; expected 0, 1, 2 or 3")
    if _device(section, "offload_optimizer") != "none":
        raise ConfigError(
            "DeepSpeed's offload_optimizer: the optimizer is inlay's, and holds the adapter alone. Leave it out; where "
            "its moments do not fit on the device, set optim: paged_adamw_32bit"
        )
    if _device(section, "offload_param") not in ("none", "cpu"):
        raise ConfigError("DeepSpeed's offload_param: only the device cpu is supported; set it, or leave it out")
    return Zero(stage, section)


def _device(section: Mapping[str, Any], part: str) -> str:
    value = section.get(part)
    return str(value.get("device", "none")).lower() if isinstance(value, dict) else "none"
