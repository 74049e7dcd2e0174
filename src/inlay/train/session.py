"""Everything that a run works with, built from its configuration: device, tokenizer, data, model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inlay.config import RunConfig
from inlay.config_loading import build_method
from inlay.errors import ConfigError
from inlay.train import models
from inlay.train.defaults import resolve_method, resolve_steps, width_of
from inlay.train.distributed import Team, same_step
from inlay.train.head_rate import head_learning_rate
from inlay.train.launcher import Zero, launched, without_deepspeed
from inlay.train.loop import total_steps
from inlay.train.precision import autocast, resolve_dtype, resolve_precision
from inlay.train.wording import check_vocabulary, fitted, start_from_words, virtual_tokens, wording_of, words_of

if TYPE_CHECKING:
    from inlay.data import Batches, DataSpec, Encoded, Prepared
    from inlay.data.encode_template import Wording

Say = Callable[[str], None]


@dataclass
class Session:
    """The parts of one run. `config` is resolved: nothing that decides the run is None any more."""

    config: RunConfig
    accelerator: Any
    tokenizer: Any
    prepared: Prepared
    model: Any
    new_modules: tuple[str, ...]
    train_batches: Batches
    wording: Wording | None = None
    zero: Zero | None = None

    @property
    def task(self) -> str:
        """What is learned."""
        return self.prepared.task

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.accelerator.device
        return device

    def eval_batches(self, encoded: Encoded) -> Batches:
        """The batches of an evaluation, always the same."""
        return batches_of(encoded, self.config, self.tokenizer, self.task, self.device, train=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return autocast(self.config, self.device)


def open_accelerator(config: RunConfig) -> Any:
    """Accelerate's engine: device and processes. Precision is ours: two runs in one process may differ in it."""
    from accelerate import Accelerator

    with without_deepspeed():
        return Accelerator(cpu=config.use_cpu, mixed_precision="no")


def open_session(config: RunConfig, method_name: str, say: Say, batches_per_step: int | None = None) -> Session:
    """Read the data, load the model, decide everything that the configuration left open.

    Args:
        config: as the user wrote it.
        method_name: lower-case name of the method, for its defaults.
        say: told what is going on.
        batches_per_step: of the run that is resumed, whose number of processes may have been another.

    Raises:
        DataError, ConfigError: see `inlay.data.prepare` and `models`.
    """
    from inlay.data import prepare

    config, zero = launched(config)
    accelerator = open_accelerator(config)
    config = same_step(config, batches_per_step, Team(accelerator))
    model_config = models.load_config(config)
    kind = models.kind_of(model_config)
    tokenizer = models.load_tokenizer(config)
    say(f"reading {shown_data(config)}")
    with accelerator.main_process_first():
        spec = data_spec(config, tokenizer, model_config)
        prepared = prepare(spec, tokenizer, kind)
    if config.verbalizer is not None and (prepared.task != "sequence-classification" or prepared.multi_label):
        several = "several classes for one text" if prepared.multi_label else prepared.task
        raise ConfigError(f"verbalizer: names one class for each text, and the data is for {several}")
    config = resolve_method(config, method_name, prepared.task, width_of(model_config))
    config = resolve_precision(config, accelerator.device)
    config = resolve_dtype(config, method_name, getattr(model_config, "dtype", None), accelerator.device)
    say(f"loading {config.model}")
    seed_everything(config.seed)
    # What is sharded is read to the CPU first, so that no device must hold it whole; packing 4-bit weights needs one.
    whole = (config.fsdp or (zero is not None and zero.stage == 3)) and config.quantization is None
    place = torch.device("cpu") if whole else accelerator.device
    loaded = models.load_model(config, prepared, tokenizer, place)
    if spec.wording is not None:
        check_vocabulary(spec.wording, loaded.model)
    train = batches_of(prepared.train, config, tokenizer, prepared.task, accelerator.device, train=True)
    steps = total_steps(config, len(train), accelerator.num_processes)
    config = resolve_steps(config, steps, held_out=bool(prepared.evals))
    return Session(config, accelerator, tokenizer, prepared, loaded.model, loaded.new, train, spec.wording, zero)


def attach_method(session: Session, name: str, *, resumed: bool = False) -> Any:
    """Attach the method of the session's configuration, ready to be trained: with its words and what it starts from.

    Args:
        session: whose model it is attached to.
        name: of the adapter.
        resumed: a checkpoint will fill it, so that starting values need not be found.

    Raises:
        ConfigError: the words do not fit the method, see `wording.fitted` and `wording.start_from_words`.
    """
    config, labels = session.config, session.prepared.labels or ()
    method = fitted(build_method(config.method), config, session.wording, session.tokenizer, labels)
    adapter = attach_new(session, method, name)
    if not resumed:
        start_from_words(adapter, config, session.tokenizer)
    session.config = _with_head_rate(session)
    return adapter


def _with_head_rate(session: Session) -> RunConfig:
    config, new = session.config, session.new_modules
    if config.head_learning_rate is not None or not new or config.verbalizer is not None:
        return config
    inputs = session.train_batches.batch(0, 0).inputs
    rate = Team(session.accelerator).of_main(head_learning_rate(session.model, new, inputs))
    return config if rate is None else config.model_copy(update={"head_learning_rate": rate})


def attach_new(session: Session, method: Any, name: str) -> Any:
    """Attach a method. Modules whose weights are new are trained with it: frozen noise helps nobody."""
    import inlay

    found = inlay.anatomy(session.model)
    head = [site.leave for site in found.select("head")] if found.new_head else []
    new = [path for path in session.new_modules if path not in head]
    return inlay.attach(session.model, method, name=name, head=[*head, *new] if new else "auto")


def data_spec(config: RunConfig, tokenizer: Any, model_config: Any) -> DataSpec:
    """What the configuration asks of the data, and what the model allows."""
    from inlay.data import DataSpec

    wording = wording_of(config, models.kind_of(model_config), tokenizer, model_config)
    positions = models.positions_of(model_config)
    if positions is not None:
        positions = max(2, positions - virtual_tokens(build_method(config.method), wording))
    return DataSpec(
        data=config.data,
        eval_data=config.eval_data,
        columns=dict(config.columns) or None,
        task=config.task,
        eval_fraction=config.eval_fraction,
        max_length=config.max_length,
        on_bad_row=config.on_bad_row,
        packing=config.packing,
        seed=config.seed,
        weights=config.weights,
        streaming=config.streaming,
        group_by_length=config.group_by_length,
        positions=None if config.max_length is not None and models.rotates(model_config) else positions,
        wording=wording,
    )


def batches_of(
    encoded: Encoded, config: RunConfig, tokenizer: Any, task: str, device: torch.device, *, train: bool
) -> Batches:
    """Batches for training, or for an evaluation."""
    from inlay.data import Batches

    assert config.per_device_train_batch_size is not None, "the configuration was not resolved"
    return Batches(
        encoded,
        config.per_device_train_batch_size if train else config.per_device_eval_batch_size,
        seed=config.seed,
        shuffle=train,
        group_by_length=config.group_by_length,
        pad_token_id=tokenizer.pad_token_id,
        task=task,
        device=device,
        words=words_of(config, tokenizer, encoded.labels.names),
    )


def seed_everything(seed: int) -> None:
    """Start every random generator that a run may use."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def identity(session: Session, adapter: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on as if nothing had happened; shown where it differs.

    The number of processes is not part of it, their product with the accumulation is.
    """
    from inlay.data.store import tokenizer_hash
    from inlay.formats.native import base_of

    config, prepared = session.config, session.prepared
    step = config.gradient_accumulation_steps * session.accelerator.num_processes
    same = (
        "seed", "learning_rate", "head_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio",
        "warmup_steps", "weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
        "loraplus_lr_ratio", "label_smoothing_factor", "per_device_train_batch_size", "group_by_length", "packing",
        "bf16", "fp16", "dtype", "quantization", "verbalizer",
    )  # fmt: skip
    return {
        "base": f"{Path(config.model).name} {_digest(base_of(adapter))}",
        "tokenizer": tokenizer_hash(session.tokenizer)[:16],
        "data": f"{Path(shown_data(config)).name} {prepared.fingerprint[:16]}",
        "method": adapter.method.spec(),
        "batches per step": step,
        "steps": total_steps(config, len(session.train_batches), session.accelerator.num_processes),
        **{key: getattr(config, key) for key in same},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shown_data(config: RunConfig) -> str:
    """The training data in one word."""
    return config.data if isinstance(config.data, str) else ", ".join(config.data)
