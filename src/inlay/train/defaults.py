"""The settings that each method starts from, in one table: they move scores as much as the choice of method does.

Peak learning rates are for AdamW; a new task head has one of its own (`head_rate.py`). `understanding` is
classification, regression, tagging and span extraction: its rates are the best of three or four on two data sets with
MiniLM (`benchmarks/learning-rates-2026-11-29.md`). `generation` is language modelling and sequence to sequence; its
rates are the published ones. Both go with the width of the model, as `for_width` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from inlay.config import MethodSetting, RunConfig
from inlay.config_loading import method_name

Kind = Literal["understanding", "generation"]


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings of one method for one kind of task."""

    learning_rate: float
    batch: int = 32
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0


def _both(understanding: Defaults, generation: Defaults | None = None) -> dict[Kind, Defaults]:
    return {"understanding": understanding, "generation": generation or understanding}


TABLE: dict[str, dict[Kind, Defaults]] = {
    # About ten times the rate of full fine-tuning, nearly independent of rank with alpha / r scaling; small batches
    # ("LoRA Without Regret", Schulman et al. 2025).
    "lora": _both(Defaults(2e-3), Defaults(5e-4, batch=8, warmup_ratio=0.03)),
    "dora": _both(Defaults(2e-3), Defaults(5e-4, batch=8, warmup_ratio=0.03)),
    # about 1e-3 on encoders (arXiv:2303.10512, tables 7 to 10); its schedule needs a warm-up of its own
    "adalora": _both(Defaults(5e-3), Defaults(1e-3, batch=8)),
    # 3e-3 in T-Few (arXiv:2205.05638), 5e-3 in PEFT's comparison
    "ia3": _both(Defaults(2e-2), Defaults(3e-3, batch=8)),
    # 1e-4 to 1e-3 by model size (arXiv:2106.10199, section 4); small encoders take the upper end and above
    "bitfit": _both(Defaults(2e-3), Defaults(1e-3, batch=8)),
    # 1e-4 for base and 5e-5 for large models (arXiv:2110.04366, table 8); bottlenecks of small models learn faster
    "bottleneck": _both(Defaults(3e-3), Defaults(2e-4, batch=8)),
    "mam": _both(Defaults(2e-4), Defaults(2e-4, batch=8)),
    "unipelt": _both(Defaults(1e-3), Defaults(5e-4, batch=8)),
    # another cell of the same table; the multi-head form is as sensitive as a prefix
    "inlay": _both(Defaults(3e-3), Defaults(2e-4, batch=8)),
    "multihead": _both(Defaults(5e-3), Defaults(2e-3, batch=8)),
    # 5e-5 with the MLP and 1e-3 to 5e-3 in the direct form (arXiv:2101.00190; PEFT's comparison); P-tuning v2's range
    # reaches 1e-2, and short runs want more
    "prefix": _both(Defaults(4e-2), Defaults(2e-3, batch=8)),
    # 0.3 with Adafactor on T5 (arXiv:2104.08691); 1e-3 to 1e-2 with AdamW
    "prompt": _both(Defaults(1e-2), Defaults(1e-2, batch=8)),
    "ptuning": _both(Defaults(1e-3), Defaults(1e-3, batch=8)),
    # 5e-3 to 1e-2 on large models, up to 6e-2 for tagging (arXiv:2110.07602, appendix B)
    "ptuningv2": _both(Defaults(2e-2), Defaults(5e-3, batch=8)),
    # as full fine-tuning for the difference, its own rate for the gates (arXiv:2012.07463, section 4)
    "diffpruning": _both(Defaults(1e-4), Defaults(5e-5, batch=8)),
    # the usual rate of encoders at this size; decoders are tuned with less
    "full": _both(Defaults(1e-4, weight_decay=0.01), Defaults(5e-5, batch=8, weight_decay=0.01)),
    # where the head is not new; a new one's rate is measured
    "headonly": _both(Defaults(5e-3)),
}

TAGGING = {name: Defaults(5e-4, batch=16) for name in ("lora", "dora")}
"""For token-classification. On WNUT17 with MiniLM 2e-3 learns that nothing is an entity (F1 0), 5e-4 reaches 0.55."""

THROUGH_AN_MLP = _both(Defaults(1e-3), Defaults(5e-5, batch=8))
"""For prefixes that an MLP makes (`mid`). On Banking77 with MiniLM 5e-3 leaves them at chance, and 1e-3 reaches 0.81,
more than the direct form at any rate (docs/reproductions.md); 5e-5 is the published rate (arXiv:2101.00190)."""

SCALED = _both(Defaults(3e-4), Defaults(2e-4, batch=8))
"""For bottlenecks as wide and as much scaled as MAM's: a step moves their output thirty times as far."""

WIDE = 1024
"""Bottleneck width times scale from which on `SCALED` holds; MAM's is 2048."""

WIDTHS: dict[Kind, tuple[int, int]] = {"understanding": (384, 384), "generation": (2000, 128)}
"""Width of the models that a rate of the table is meant for, and the least width at which it was tried."""

FALLBACK = _both(Defaults(1e-3), Defaults(5e-4, batch=8))

EVALUATIONS_PER_RUN = 5
LOG_LINES_PER_RUN = 100
BASELINE_STEPS = 500


def kind_of(task: str) -> Kind:
    """Which column of the table a task reads."""
    return "generation" if task in ("causal-lm", "seq2seq") else "understanding"


def defaults(method: MethodSetting, task: str, width: int | None = None) -> Defaults:
    """The settings for a method; of a mix, those with the lowest learning rate.

    Args:
        method: as in a run configuration, or its lower-case name, `a+b` for a mix.
        task: what is learned.
        width: hidden size of the model; None leaves the rate as the table has it.
    """
    kind = kind_of(task)
    own = TAGGING if task == "token-classification" else {}
    entries = method if isinstance(method, list) else [method]
    parts = [part for entry in entries for part in _parts(entry, own, kind)]
    chosen = min(parts, key=lambda part: part.learning_rate)
    return chosen if width is None else replace(chosen, learning_rate=for_width(chosen.learning_rate, kind, width))


def _parts(entry: MethodSetting, own: dict[str, Defaults], kind: Kind) -> list[Defaults]:
    """What the methods named by one entry start from."""
    name = method_name(entry)
    if _is_wide(entry):
        return [SCALED[kind]]
    if name in ("prefix", "ptuningv2") and isinstance(entry, dict) and entry.get("mid") is not None:
        return [THROUGH_AN_MLP[kind]]
    return [own.get(n) or TABLE.get(n, FALLBACK)[kind] for n in name.split("+")]


def for_width(rate: float, kind: Kind, width: int) -> float:
    """rate · (width of the models it is meant for / width)^0.78, to two digits.

    The exponent is the one fitted to Llama in "LoRA Without Regret" (Schulman et al. 2025), from 2,000 as here; Qwen's
    is 0.08 there, and between 1,000 and 4,000 the two are less than a factor of two apart. Models narrower than those
    that were tried count as wide as these: 128 features for texts, MiniLM's 384 else.
    """
    meant, least = WIDTHS[kind]
    return float(f"{rate * (meant / max(width, least)) ** 0.78:.2g}")


def width_of(model_config: Any) -> int | None:
    """The hidden size of a model; None where its configuration names none."""
    width = getattr(model_config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None


def _is_wide(entry: MethodSetting) -> bool:
    """Whether it is a bottleneck whose step moves its output about as far as MAM's does."""
    if not isinstance(entry, dict) or method_name(entry) != "bottleneck":
        return False
    size, scale = entry.get("size"), entry.get("scale", 1.0)
    return isinstance(size, int) and isinstance(scale, int | float) and size * scale >= WIDE


def resolve_method(config: RunConfig, method: str, task: str, width: int | None = None) -> RunConfig:
    """The configuration with what depends on the method, and on the width of its model, filled in."""
    chosen = defaults(config.method if method_name(config.method) == method else method, task, width)
    update: dict[str, object] = {"task": task}
    if config.learning_rate is None:
        update["learning_rate"] = chosen.learning_rate
    elif method == "headonly" and config.head_learning_rate is None and not config.resume:
        update["head_learning_rate"] = config.learning_rate
    if config.per_device_train_batch_size is None:
        update["per_device_train_batch_size"] = chosen.batch
    if config.lr_scheduler_type is None:
        update["lr_scheduler_type"] = chosen.lr_scheduler_type
    if config.warmup_ratio is None and config.warmup_steps is None:
        update["warmup_ratio"] = chosen.warmup_ratio
    if config.weight_decay is None:
        update["weight_decay"] = chosen.weight_decay
    return config.model_copy(update=update)


def resolve_steps(config: RunConfig, total_steps: int, held_out: bool) -> RunConfig:
    """The configuration with what depends on the length of the run filled in."""
    update: dict[str, object] = {}
    every = max(1, -(-total_steps // EVALUATIONS_PER_RUN))
    if config.logging_steps is None:
        update["logging_steps"] = max(1, total_steps // LOG_LINES_PER_RUN)
    if config.eval_steps is None and held_out:
        update["eval_steps"] = every
    if config.save_steps is None:
        update["save_steps"] = config.eval_steps or every
    return config.model_copy(update=update)
