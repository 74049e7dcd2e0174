"""The run configuration: every key that `inlay train` knows, its type, its default and what it means.

Keys are those of `transformers.TrainingArguments` where it has one. `config_loading.py` reads them from a YAML file,
from `key=value` words and from flags. Nothing here imports torch or transformers: a wrong key is told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inlay.complaints import type_name

Task = Literal[
    "sequence-classification",
    "regression",
    "token-classification",
    "question-answering",
    "causal-lm",
    "seq2seq",
]
Scheduler = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "sgd",
]
Tracker = Literal["none", "tensorboard", "trackio", "wandb", "mlflow"]
MethodSetting = str | dict[str, Any] | list[str | dict[str, Any]]

_OTHER_NAMES = {
    "model": "base_model model_name model_name_or_path pretrained_model",
    "data": "dataset datasets train_data train_file data_path",
    "eval_data": "eval_dataset val_data validation_file test_file",
    "eval_fraction": "val_size val_set_size val_split_fraction test_size",
    "method": "adapter peft peft_type finetuning_type",
    "method.rank": "r rank lora_r lora_rank",
    "method.alpha": "alpha lora_alpha",
    "method.dropout": "lora_dropout",
    "method.sites": "sites target_modules lora_target lora_target_modules",
    "learning_rate": "lr",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "max_steps": "steps num_steps max_iters num_train_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_length block_size max_source_length",
    "lr_scheduler_type": "scheduler lr_scheduler schedule",
    "warmup_ratio": "warmup",
    "optim": "optimizer",
    "max_grad_norm": "clip gradient_clipping",
    "label_smoothing_factor": "label_smoothing",
    "early_stopping_patience": "early_stopping patience early_stop_interval",
    "resume": "resume_from_checkpoint auto_resume",
    "output_dir": "out_dir output",
    "quantization": "load_in_4bit quantize",
    "packing": "sample_packing neat_packing",
    "report_to": "wandb logger",
    "bf16": "precision mixed_precision fp32",
    "eval_steps": "eval_strategy evaluation_strategy",
    "save_steps": "save_strategy",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing",
}
ALIASES = {other: key for key, others in _OTHER_NAMES.items() for other in others.split()}
"""What other tools call a key. Never accepted, only offered as "did you mean"."""


class RunConfig(BaseModel):
    """Everything that decides a run. Unknown keys and wrong types are errors; `None` is "the default for this run"."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    model: str
    """folder or hub name of the pretrained model"""
    data: str | list[str]
    """training data: a file, a folder, a hub name `org/name:subset`, `file#500` for a sample"""
    eval_data: str | list[str] | dict[str, str] | None = None
    """held-out data; without it `eval_fraction` of the data is held out"""
    eval_fraction: float = Field(0.1, ge=0, lt=1)
    """part of the data held out when there is no `eval_data`; 0 holds out nothing"""
    columns: dict[str, str] = Field(default_factory=dict)
    """role=column, where the columns have other names"""
    task: Task | None = None
    """what to learn; found from the data and the model when absent"""
    max_length: int | None = Field(None, ge=2)
    """tokens per row; longer rows are cut and counted"""
    packing: bool = False
    """several rows in one sequence, without attention between them (causal-lm)"""
    weights: list[float] | None = None
    """share of each set of `data` in an epoch; rows as they are when absent"""
    streaming: bool = False
    """tokenize rows when they are needed, for data larger than the disk cache should be"""
    group_by_length: bool = True
    """rows of similar length share a batch"""
    on_bad_row: Literal["error", "skip"] = "error"
    """stop at a bad row, or write it aside and count it"""
    method: MethodSetting = "lora"
    """what is trained: a method's name, or a mapping `name:` and its settings"""
    template: str | None = None
    """with verbalizer: a text around {text} (and {text_pair}), with {mask} where a masked model answers, behind which a
    causal one does, and {prompt:3} where 3 virtual tokens of ptuning stand"""
    verbalizer: dict[str, str | list[str]] | None = None
    """class: word or words that a language model answers with, instead of a new task head"""
    init_text: str | None = None
    """words that a prompt or a prefix starts from"""
    init_classes: bool = False
    """a prompt starts from the names of the classes"""

    output_dir: str | None = None
    """the run folder; `runs/<model>-<data>-<method>` when absent"""
    resume: bool | str = False
    """continue from the newest complete checkpoint of the run folder, or from one named"""
    allow_changed: bool = False
    """resume although base, tokenizer, data, seed, method or batches changed; recorded in the run"""

    revision: str | None = None
    """branch, tag or commit of the model on the hub"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """how the frozen weights are kept; auto: in bf16 where the run computes in bf16, else as stored"""
    attn_implementation: str | None = None
    """attention function of transformers (sdpa, eager, flash_attention_2, ...)"""
    quantization: Literal["nf4", "fp4", "int4"] | None = None
    """keep the frozen weights in 4 bits (QLoRA)"""
    double_quant: bool | None = None
    """with quantization: the scales are quantised too; on when absent"""
    trust_remote_code: bool = False
    """run code that comes with the model; off unless asked for"""

    learning_rate: float | None = Field(None, gt=0)
    """peak learning rate; each method has its own default"""
    head_learning_rate: float | None = Field(None, gt=0)
    """peak learning rate of a new task head; by default such that one step moves a logit by about 1"""
    num_train_epochs: float = Field(3.0, gt=0)
    """passes over the data"""
    max_steps: int = Field(-1, ge=-1)
    """optimizer steps; above 0 it takes the place of num_train_epochs"""
    per_device_train_batch_size: int | None = Field(None, ge=1)
    """rows per forward pass; each method has its own default"""
    per_device_eval_batch_size: int = Field(64, ge=1)
    """rows per forward pass in evaluation"""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """forward passes per optimizer step, weighted by tokens"""
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    """part of the steps over which the learning rate rises"""
    warmup_steps: int | None = Field(None, ge=0)
    """the same as a number of steps"""
    lr_scheduler_type: Scheduler | None = None
    """how the learning rate falls"""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """further settings of the schedule"""
    weight_decay: float | None = Field(None, ge=0)
    """decay of matrices; vectors and biases are not decayed"""
    max_grad_norm: float = Field(1.0, ge=0)
    """gradients are scaled down to this norm; 0 leaves them"""
    optim: Optimizer = "adamw_torch_fused"
    """the optimizer"""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's beta 1"""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's beta 2"""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon"""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """LoRA+: learning rate of B over that of A (arXiv:2402.12354 uses 16)"""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """probability mass spread over all classes"""
    bf16: bool | None = None
    """bf16 autocast; measured at the start of the run when absent"""
    fp16: bool = False
    """fp16 autocast with loss scaling, for GPUs without bf16"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""
    fsdp: bool = False
    """share the frozen weights among the processes of torchrun or accelerate launch (FSDP2)"""
    torch_compile: bool = False
    """compile the model first"""
    seed: int = Field(42, ge=0, lt=2**32)
    """seed of the new weights, the order of the data, dropout and the split"""

    logging_steps: int | None = Field(None, ge=1)
    """steps between lines of metrics.jsonl; about 100 lines a run when absent"""
    eval_steps: int | None = Field(None, ge=1)
    """steps between evaluations; five a run when absent"""
    save_steps: int | None = Field(None, ge=1)
    """steps between checkpoints; as eval_steps when absent"""
    save_total_limit: int = Field(2, ge=1)
    """how many checkpoints are kept"""
    metric_for_best_model: str | None = None
    """metric that decides which adapter is best; that of the task when absent"""
    greater_is_better: bool | None = None
    """direction of that metric; known for all built-in ones"""
    load_best_model_at_end: bool = True
    """the run's adapter is the best one, not the last"""
    early_stopping_patience: int | None = Field(None, ge=1)
    """stop after this many evaluations without a better metric"""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """what counts as better"""
    baseline: bool = True
    """at the end, train the task head alone for the same steps (at most 500) and compare"""

    eval_samples: int = Field(3, ge=0)
    """texts generated from held-out rows at each evaluation (generation tasks)"""
    generation_metrics: bool = True
    """at the end, generate for `generation_eval_rows` rows; exact match, BLEU, ROUGE"""
    generation_eval_rows: int = Field(64, ge=1)
    """how many held-out rows that is"""
    generation_max_new_tokens: int = Field(64, ge=1)
    """longest generated text, in tokens"""
    generation_num_beams: int = Field(1, ge=1)
    """beams; 1 is greedy"""
    report_to: list[Tracker] = Field(default_factory=list)
    """trackers besides metrics.jsonl; nothing leaves the machine by default"""
    use_cpu: bool = False
    """stay on the CPU although there is an accelerator"""


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs (key, what is wrong) for keys that are right alone and cannot stand together."""

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
        yield "double_quant", "has no effect without quantization: nf4, fp4 or int4"
    if get("allow_changed") and not get("resume"):
        yield "allow_changed", "has no effect without resume"
    if get("weights") is not None and (not isinstance(get("data"), list) or len(get("data")) != len(get("weights"))):
        yield "weights", "there must be as many as sets in data"
    if (get("template") is None) != (get("verbalizer") is None):
        given, other = ("template", "verbalizer") if get("verbalizer") is None else ("verbalizer", "template")
        yield given, f"has no effect without {other}; they go together"
    if get("verbalizer") is not None and get("task") not in (None, "sequence-classification"):
        yield "verbalizer", f"names classes, and task is {get('task')!r}"
    if get("init_text") is not None and get("init_classes"):
        yield "init_classes", "init_text is set too; keep one of the two"
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
