"""The run configuration: every key that `inlay train` knows, its type, its default and what it means.

Keys are those of `transformers.TrainingArguments` where it has one. `config_loading.py` reads them from a YAML file, from
`key=value` words and from flags. Nothing here imports torch or transformers: a wrong key is told in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Task = Literal[
    "sequence-classification", "regression", "token-classification", "question-answering", "causal-lm", "seq2seq"
]
Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"
]  # fmt: skip
Tracker = Literal["none", "tensorboard", "trackio", "wandb", "mlflow"]
MethodSetting = str | dict[str, Any] | list[str | dict[str, Any]]

# Names of other tools. They are never accepted, only offered as "did you mean".
ALIASES = {
    "base_model": "model", "model_name": "model", "model_name_or_path": "model", "pretrained_model": "model",
    "dataset": "data", "datasets": "data", "train_data": "data", "train_file": "data", "data_path": "data",
    "eval_dataset": "eval_data", "val_data": "eval_data", "validation_file": "eval_data", "test_file": "eval_data",
    "val_size": "eval_fraction", "val_set_size": "eval_fraction", "val_split_fraction": "eval_fraction",
    "adapter": "method", "peft": "method", "peft_type": "method", "finetuning_type": "method",
    "r": "method.rank", "rank": "method.rank", "lora_r": "method.rank", "lora_rank": "method.rank",
    "lora_alpha": "method.alpha", "alpha": "method.alpha", "lora_dropout": "method.dropout",
    "target_modules": "method.sites", "lora_target": "method.sites", "lora_target_modules": "method.sites", "sites": "method.sites",
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "n_epochs": "num_train_epochs",
    "steps": "max_steps", "num_steps": "max_steps", "max_iters": "max_steps", "num_train_steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps", "gradient_accumulation": "gradient_accumulation_steps",
    "cutoff_len": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length", "sequence_len": "max_length",
    "seq_length": "max_length", "block_size": "max_length", "max_source_length": "max_length",
    "scheduler": "lr_scheduler_type", "lr_scheduler": "lr_scheduler_type", "schedule": "lr_scheduler_type",
    "warmup": "warmup_ratio", "optimizer": "optim", "clip": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "label_smoothing": "label_smoothing_factor", "early_stopping": "early_stopping_patience",
    "patience": "early_stopping_patience", "resume_from_checkpoint": "resume", "out_dir": "output_dir", "output": "output_dir",
    "load_in_4bit": "quantization", "quantize": "quantization", "sample_packing": "packing", "neat_packing": "packing",
    "wandb": "report_to", "logger": "report_to", "precision": "bf16", "mixed_precision": "bf16", "fp32": "bf16",
    "eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps", "save_strategy": "save_steps",
    "grad_checkpointing": "gradient_checkpointing", "activation_checkpointing": "gradient_checkpointing",
}  # fmt: skip


class RunConfig(BaseModel):
    """Everything that decides a run. Unknown keys and wrong types are errors; `None` means "the default for this run"."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    model: str = Field(description="folder or hub name of the pretrained model")
    data: str | list[str] = Field(description="training data: a file, a folder, a hub name `org/name:subset`, `file#500` for a sample")
    eval_data: str | list[str] | dict[str, str] | None = Field(None, description="held-out data; without it `eval_fraction` of the data is held out")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="part of the data held out when there is no `eval_data`; 0 holds out nothing")
    columns: dict[str, str] = Field(default_factory=dict, description="role=column, where the columns have other names")
    task: Task | None = Field(None, description="what to learn; found from the data and the model when absent")
    max_length: int | None = Field(None, ge=2, description="tokens per row; longer rows are cut and counted")
    packing: bool = Field(False, description="several rows in one sequence, without attention between them (causal-lm)")
    group_by_length: bool = Field(True, description="rows of similar length share a batch")
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a bad row, or write it aside and count it")
    method: MethodSetting = Field("lora", description="what is trained: a method's name, or a mapping `name:` and its settings")

    output_dir: str | None = Field(None, description="the run folder; `runs/<model>-<data>-<method>` when absent")
    resume: bool | str = Field(False, description="continue from the newest complete checkpoint of the run folder, or from one named")
    allow_changed: bool = Field(False, description="resume although base, tokenizer, data, seed, method or batches changed; recorded in the run")

    revision: str | None = Field(None, description="branch, tag or commit of the model on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="how the frozen weights are kept; auto: as stored")
    attn_implementation: str | None = Field(None, description="attention function of transformers (sdpa, eager, flash_attention_2, ...)")
    quantization: Literal["nf4", "fp4"] | None = Field(None, description="keep the frozen weights in 4 bits (QLoRA)")
    double_quant: bool | None = Field(None, description="with quantization: the scales are quantised too; on when absent")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; off unless asked for")

    learning_rate: float | None = Field(None, gt=0, description="peak learning rate; each method has its own default")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; above 0 it takes the place of num_train_epochs")
    per_device_train_batch_size: int | None = Field(None, ge=1, description="rows per forward pass; each method has its own default")
    per_device_eval_batch_size: int = Field(64, ge=1, description="rows per forward pass in evaluation")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes per optimizer step, weighted by tokens")
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="part of the steps over which the learning rate rises")
    warmup_steps: int | None = Field(None, ge=0, description="the same as a number of steps")
    lr_scheduler_type: Scheduler | None = Field(None, description="how the learning rate falls")
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict, description="further settings of the schedule")
    weight_decay: float | None = Field(None, ge=0, description="decay of matrices; vectors and biases are not decayed")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0 leaves them")
    optim: Optimizer = Field("adamw_torch_fused", description="the optimizer")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta 1")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta 2")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    loraplus_lr_ratio: float | None = Field(None, gt=0, description="LoRA+: learning rate of B over that of A (arXiv:2402.12354 uses 16)")
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="probability mass spread over all classes")
    bf16: bool | None = Field(None, description="bf16 autocast; measured at the start of the run when absent")
    fp16: bool = Field(False, description="fp16 autocast with loss scaling, for GPUs without bf16")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    torch_compile: bool = Field(False, description="compile the model first")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the new weights, the order of the data, dropout and the split")

    logging_steps: int | None = Field(None, ge=1, description="steps between lines of metrics.jsonl; about 100 lines a run when absent")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; five a run when absent")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; as eval_steps when absent")
    save_total_limit: int = Field(2, ge=1, description="how many checkpoints are kept")
    metric_for_best_model: str | None = Field(None, description="metric that decides which adapter is best; that of the task when absent")
    greater_is_better: bool | None = Field(None, description="direction of that metric; known for all built-in ones")
    load_best_model_at_end: bool = Field(True, description="the run's adapter is the best one, not the last")
    early_stopping_patience: int | None = Field(None, ge=1, description="stop after this many evaluations without a better metric")
    early_stopping_threshold: float = Field(0.0, ge=0, description="what counts as better")
    baseline: bool = Field(True, description="at the end, train the task head alone for the same steps (at most 500) and compare")

    eval_samples: int = Field(3, ge=0, description="texts generated from held-out rows at each evaluation (generation tasks)")
    generation_metrics: bool = Field(True, description="at the end, generate for `generation_eval_rows` rows; exact match, BLEU, ROUGE")
    generation_eval_rows: int = Field(64, ge=1, description="how many held-out rows that is")
    generation_max_new_tokens: int = Field(64, ge=1, description="longest generated text, in tokens")
    generation_num_beams: int = Field(1, ge=1, description="beams; 1 is greedy")
    report_to: list[Tracker] = Field(default_factory=list, description="trackers besides metrics.jsonl; nothing leaves the machine by default")
    use_cpu: bool = Field(False, description="stay on the CPU although there is an accelerator")


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs (key, what is wrong) for keys that are right alone and cannot stand together. Absent keys have their defaults."""

    def get(key: str) -> Any:
        return values.get(key, RunConfig.model_fields[key].get_default(call_default_factory=True, validated_data={}))

    held_out = bool(get("eval_data")) or get("eval_fraction") > 0
    if get("warmup_ratio") is not None and get("warmup_steps") is not None:
        yield "warmup_steps", "warmup_ratio is set too; keep one of the two"
    if get("bf16") and get("fp16"):
        yield "fp16", "bf16 is on too; keep one of the two"
    if get("max_steps") == 0:
        yield "max_steps", "0 trains nothing; give a number of steps, or -1 for num_train_epochs"
    if not held_out:
        for key in ("early_stopping_patience", "metric_for_best_model", "eval_steps"):
            if get(key) is not None:
                yield key, "nothing is held out to measure it on; set eval_data or eval_fraction"
    if get("double_quant") is not None and get("quantization") is None:
        yield "double_quant", "has no effect without quantization: nf4 or fp4"
    if get("allow_changed") and not get("resume"):
        yield "allow_changed", "has no effect without resume"
    if "none" in get("report_to") and len(get("report_to")) > 1:
        yield "report_to", "'none' stands beside other trackers"
    if get("packing") and get("task") not in (None, "causal-lm"):
        yield "packing", f"packs rows of causal-lm only, and task is {get('task')!r}"


def key_table() -> list[tuple[str, str, str, str]]:
    """Rows (key, type, default, meaning) of every key, in order."""
    rows = []
    for key, field in RunConfig.model_fields.items():
        default = "" if field.is_required() else repr(field.get_default(call_default_factory=True, validated_data={}))
        rows.append((key, type_name(field.annotation), "" if default == "None" else default, field.description or ""))
    return rows


def type_name(annotation: Any) -> str:
    """A type as a user would say it.

    >>> type_name(int | None)
    'int'
    """
    if annotation is type(None):
        return ""
    parts = get_args(annotation)
    if parts and all(isinstance(part, str) for part in parts):
        return "|".join(parts)
    if parts and getattr(annotation, "__origin__", None) in (list, dict):
        return annotation.__origin__.__name__ + " of " + "=".join(filter(None, map(type_name, parts)))
    if parts:
        return " or ".join(dict.fromkeys(filter(None, map(type_name, parts))))
    return getattr(annotation, "__name__", str(annotation))
