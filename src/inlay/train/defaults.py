"""The settings that each method starts from, in one table: they move scores as much as the choice of method does.

Peak learning rates are for AdamW. `understanding` is classification, regression, tagging and span extraction, where
encoders of 20 to 400 M parameters are usual; `generation` is language modelling and sequence to sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inlay.config import RunConfig

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
    # ("LoRA Without Regret", Schulman et al. 2025). The rate for understanding was chosen on the demo task and
    # movie review polarity with MiniLM (docs/tutorial.md).
    "lora": _both(Defaults(2e-3), Defaults(5e-4, batch=8, warmup_ratio=0.03)),
    "dora": _both(Defaults(2e-3), Defaults(5e-4, batch=8, warmup_ratio=0.03)),
    # about 1e-3 on encoders (arXiv:2303.10512, tables 7 to 10); its schedule needs a warm-up of its own
    "adalora": _both(Defaults(2e-3), Defaults(1e-3, batch=8)),
    # 3e-3 in T-Few (arXiv:2205.05638), 5e-3 in PEFT's comparison
    "ia3": _both(Defaults(5e-3), Defaults(3e-3, batch=8)),
    # 1e-4 to 1e-3 by model size (arXiv:2106.10199, section 4); small encoders take the upper end and above
    "bitfit": _both(Defaults(2e-3), Defaults(1e-3, batch=8)),
    # 1e-4 for base and 5e-5 for large models (arXiv:2110.04366, table 8); bottlenecks of small models learn faster
    # (MiniLM, demo task, 60 steps: accuracy 0.43 at 1e-3, 0.55 at 3e-3, 0.60 at 1e-2). MAM is wide and scales by 4:
    # there 1e-3 is too much (0.17 after 80 steps, 0.51 at 3e-4).
    "bottleneck": _both(Defaults(3e-3), Defaults(2e-4, batch=8)),
    "mam": _both(Defaults(3e-4), Defaults(2e-4, batch=8)),
    "unipelt": _both(Defaults(1e-3), Defaults(5e-4, batch=8)),
    # another cell of the same table; the multi-head form is as sensitive as a prefix
    "inlay": _both(Defaults(3e-3), Defaults(2e-4, batch=8)),
    "multihead": _both(Defaults(5e-3), Defaults(2e-3, batch=8)),
    # 5e-5 with the MLP and 1e-3 to 5e-3 in the direct form (arXiv:2101.00190; PEFT's comparison)
    "prefix": _both(Defaults(5e-3), Defaults(2e-3, batch=8)),
    # 0.3 with Adafactor on T5 (arXiv:2104.08691); 1e-3 to 1e-2 with AdamW
    "prompt": _both(Defaults(1e-2), Defaults(1e-2, batch=8)),
    "ptuning": _both(Defaults(1e-3), Defaults(1e-3, batch=8)),
    # 5e-3 to 1e-2 (arXiv:2110.07602, appendix B)
    "ptuningv2": _both(Defaults(7e-3), Defaults(5e-3, batch=8)),
    # as full fine-tuning for the difference, its own rate for the gates (arXiv:2012.07463, section 4)
    "diffpruning": _both(Defaults(1e-4), Defaults(5e-5, batch=8)),
    # the usual rate of encoders at this size; decoders are tuned with less
    "full": _both(Defaults(1e-4, weight_decay=0.01), Defaults(5e-5, batch=8, weight_decay=0.01)),
    # a linear map on fixed features: convex, so a high rate is safe
    "headonly": _both(Defaults(5e-3)),
}

TAGGING = {name: Defaults(5e-4, batch=16) for name in ("lora", "dora")}
"""For token-classification. On WNUT17 with MiniLM 2e-3 learns that nothing is an entity (F1 0), 5e-4 reaches 0.55."""

FALLBACK = _both(Defaults(1e-3), Defaults(5e-4, batch=8))

EVALUATIONS_PER_RUN = 5
LOG_LINES_PER_RUN = 100
BASELINE_STEPS = 500


def kind_of(task: str) -> Kind:
    """Which column of the table a task reads."""
    return "generation" if task in ("causal-lm", "seq2seq") else "understanding"


def defaults(method: str, task: str) -> Defaults:
    """The settings for a method's lower-case name; of a mix `a+b`, those with the lowest learning rate."""
    kind = kind_of(task)
    own = TAGGING if task == "token-classification" else {}
    parts = [own.get(name) or TABLE.get(name, FALLBACK)[kind] for name in method.split("+")]
    return min(parts, key=lambda part: part.learning_rate)


def resolve_method(config: RunConfig, method: str, task: str) -> RunConfig:
    """The configuration with what depends on the method filled in."""
    chosen = defaults(method, task)
    update: dict[str, object] = {"task": task}
    if config.learning_rate is None:
        update["learning_rate"] = chosen.learning_rate
    elif method == "headonly" and config.head_learning_rate is None:
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
