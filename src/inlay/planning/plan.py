"""`plan`: what a run will cost, before it runs, from the configuration of a model alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inlay.errors import ConfigError, InlayError, QuantizationError, nearest
from inlay.methods.base import Method, methods
from inlay.planning.bases import BASES, Base
from inlay.planning.footprint import OPTIMIZERS, Footprint, Memory
from inlay.planning.skeleton import config_of, task_of
from inlay.planning.step import Device
from inlay.planning.study import Counts, Settings, Study, Trial, lengths_near
from inlay.train.models import positions_of, rotates

REFERENCE = "full, in place"
"""The row that the others are compared with: every parameter of the model itself is trained, without an adapter."""

HEADROOM = 0.05
"""Part of a device's memory that a plan leaves free, for the driver's context and gaps between allocations."""


@dataclass(frozen=True)
class Cost:
    """One method on one base.

    Attributes:
        method, base: their names; `checkpointing` whether activations are computed twice instead of kept.
        trained, stored: values that are learned, and that the adapter's file holds; `file_bytes` is its size.
        memory: bytes on the device at the moment when a step needs most; `peak` is their sum.
        host_bytes: optimizer state in host memory (paged).
        held_bytes: what the forward pass keeps for the backward pass.
        flops_per_token: multiplications and additions of matrix products and attention, both passes.
        step_vs_full: these over those of full fine-tuning in place: the step time as far as arithmetic decides it.
        fits: whether it stays within the memory given, less 5 %; None where none was given.
        largest_batch: rows of that length that fit. largest_length: tokens of a row that fit at that
            batch, as far as the model has positions for them.
    """

    method: str
    base: str
    checkpointing: bool
    trained: int
    stored: int
    file_bytes: int
    memory: Memory
    host_bytes: int
    held_bytes: int
    flops_per_token: float
    step_vs_full: float
    fits: bool | None = None
    largest_batch: int | None = None
    largest_length: int | None = None

    @property
    def peak(self) -> int:
        """Bytes on the device at the moment when a step needs most."""
        return self.memory.total


@dataclass
class Plan:
    """What every method costs on every base.

    Attributes:
        model: its name or type; `parameters` of the base, `task`, `device`, `optim`.
        batch, length: rows of a step and tokens of a row.
        capacity: bytes of the device, if given.
        positions: tokens that a row can have, where the model looks positions up in a table.
        costs: one for each method, base and choice of checkpointing.
        refused: methods and bases that do not work on this model, with the reason.
    """

    model: str
    task: str
    parameters: int
    batch: int
    length: int
    device: str
    optim: str
    checkpointing: bool
    capacity: int | None
    positions: int | None
    costs: list[Cost] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def cost(self, method: str, base: str = "bf16", checkpointing: bool | None = None) -> Cost:
        """The entry of a method on a base.

        Raises:
            ConfigError: there is none; the message gives the reason where the method was refused.
        """
        wanted = self.checkpointing if checkpointing is None else checkpointing
        for cost in self.costs:
            if (cost.method, cost.base, cost.checkpointing) == (method, base, wanted):
                return cost
        for name in (method, base):
            if name in self.refused:
                raise ConfigError(f"{name} does not work on {self.model}: {self.refused[name]}")
        known = {f"{c.method} on {c.base}" for c in self.costs}
        raise ConfigError(f"the plan has no {method} on {base}; {nearest(f'{method} on {base}', known)}")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as values for JSON; the sum of a memory stands beside its parts."""
        document = asdict(self)
        for entry, cost in zip(document["costs"], self.costs, strict=True):
            entry["memory"]["total"] = cost.peak
        return document

    def __str__(self) -> str:
        from rich.console import Console

        from inlay.planning.table import tables

        console = Console(width=150, no_color=True)
        with console.capture() as shown:
            console.print(*tables(self), sep="\n")
        return shown.get()


def plan(
    model: Any,
    method: Method | str | Sequence[Method | str] | None = None,
    *,
    bases: Sequence[str] = tuple(BASES),
    detail: str = "bf16",
    batch: int = 8,
    length: int = 512,
    target_length: int | None = None,
    task: str | None = None,
    gpu: str | int | None = None,
    checkpointing: bool = False,
    optim: str = "adamw_torch_fused",
    accumulates: bool = False,
    device: Device = "cuda",
    revision: str | None = None,
    told: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """What training costs, for each method and each way to store the base. Only the model's configuration is read.

    A step of each method is run on tensors without storage, and every allocation is followed (`timeline.py`).

    Args:
        model: name or folder of a model, or its configuration.
        method: one method or several, as objects or as words (`lora`, `lora:rank=64`, `lora+prefix`); all when absent.
        bases: of "fp32", "bf16", "int8", "nf4", "nf4-dq".
        detail: the base for which both choices of checkpointing and the largest length are worked out. With one method
            they are worked out for all bases.
        batch: rows of a step. length: tokens of each. target_length: tokens of an answer, for seq2seq.
        task: as in `inlay train`; by default what models of this kind are mostly trained for.
        gpu: memory of the device: "24GB" (of 2^30 bytes, as they are sold), or a number of bytes.
        checkpointing: activations are computed again in the backward pass instead of kept.
        optim: an optimizer of `inlay train`.
        accumulates: gradients of earlier batches are there during the forward pass.
        device: "cuda" or "cpu", which differ in kernels and in where a paged optimizer keeps its state.
        revision: branch, tag or commit of the model on the hub.
        told: called with a method's name, its number and how many there are.

    Raises:
        ConfigError: an unknown model, base, optimizer, task or size. MethodError: the one method asked for cannot work.
    """
    _check(bases, detail, batch, length, optim, device)
    config = config_of(model, revision)
    if target_length is not None and not getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"target_length={target_length}: {config.model_type} has no decoder of its own; leave it out")
    most = _most_tokens(config)
    if most is not None and max(length, target_length or 0) > most:
        raise ConfigError(
            f"length={max(length, target_length or 0)}: {config.model_type} has a table of {most} positions; "
            f"write length={most} or less"
        )
    settings = Settings(task_of(config, task), length, target_length, device, optim, accumulates)
    study = Study(config, settings)
    chosen = _chosen(method)
    name = model if isinstance(model, str) else str(getattr(config, "name_or_path", "") or config.model_type)
    sizes = (batch, length, device, optim, checkpointing, bytes_of(gpu), most)
    made = Plan(name, settings.task, study.parameters, *sizes)
    every = len(chosen) == 1
    groups = _groups(study, bases, made)
    if not groups:
        raise ConfigError(f"model: {name} can be stored in none of {', '.join(bases)}: {made.refused}")
    reference: dict[bool, float] = {}
    for index, (title, one) in enumerate([(REFERENCE, None), *chosen]):
        if told is not None:
            told(title, index, len(chosen) + 1)
        try:
            for group in groups:
                with study.attached(one, group[0]) as trial:
                    _measure(trial, title, group, made, detail, every, reference)
        except InlayError as error:
            if one is not None and every:
                raise
            made.refused[title] = str(error)
            made.costs = [cost for cost in made.costs if cost.method != title]
    return made


def _most_tokens(config: Any) -> int | None:
    """Tokens that a row can have where positions are looked up in a table; None where they are computed."""
    return None if rotates(config) else positions_of(config)


def _check(bases: Sequence[str], detail: str, batch: int, length: int, optim: str, device: str) -> None:
    for name in (*bases, detail):
        if name not in BASES:
            raise ConfigError(f"base {name!r} is not known: {nearest(name, BASES)}")
    if batch < 1 or length < 2:
        raise ConfigError(f"batch={batch}, length={length}: a step needs a row, and a row two tokens")
    if optim not in OPTIMIZERS:
        raise ConfigError(f"optim={optim!r} is not known: {nearest(optim, OPTIMIZERS)}")
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device={device!r} must be cuda or cpu")


def _chosen(method: Method | str | Sequence[Method | str] | None) -> list[tuple[str, Method]]:
    from inlay.config_loading import build_method, method_name, method_of_words

    if method is None:
        wanted: Sequence[Method | str] = [name for name in methods() if name != "inlay"]
    else:
        wanted = [method] if isinstance(method, Method | str) else list(method)
    found: list[tuple[str, Method]] = []
    for entry in wanted:
        if isinstance(entry, Method):
            found.append(("+".join(part.spec_name() for part in entry.parts), entry))
        else:
            setting = method_of_words(entry, "method")
            found.append((entry if ":" in entry else method_name(setting), build_method(setting)))
    names = [name for name, _ in found]
    # Two settings of one method are told apart by their settings.
    return [(repr(m) if names.count(name) > 1 else name, m) for name, m in found]


def _groups(study: Study, bases: Sequence[str], made: Plan) -> list[list[Base]]:
    """Bases whose steps are alike, so that one recording serves them: those that compute in bf16 and keep no inputs."""
    groups: dict[tuple[Any, bool], list[Base]] = {}
    for name in dict.fromkeys(bases):
        base = BASES[name]
        try:
            study.weights(base)
        except QuantizationError as error:
            made.refused[name] = str(error)
            continue
        groups.setdefault((base.compute, base.bits == 8), []).append(base)
    return list(groups.values())


def _measure(
    trial: Trial, title: str, group: list[Base], made: Plan, detail: str, every: bool, reference: dict[bool, float]
) -> None:
    """Adds the costs of a method on bases whose steps are alike."""
    counts = trial.counts
    deep = every or detail in (base.name for base in group)
    for checkpointing in (made.checkpointing, not made.checkpointing) if deep else (made.checkpointing,):
        if trial.adapter is None and group[0].bits == 8 and checkpointing in reference:
            continue
        wanted = deep and made.capacity is not None and checkpointing == made.checkpointing
        recordings = trial.record(checkpointing, lengths_near(made.length, 3 if wanted else 1))
        other = checkpointing != made.checkpointing
        for base in group:
            if other and not (every or base.name == detail):
                continue
            if trial.adapter is None and base.bits < 16:
                continue  # quantised weights cannot be trained themselves
            cost = _cost(trial.footprint(recordings, base), title, base, checkpointing, counts, made, reference)
            made.costs.append(cost)
        if trial.adapter is None:
            constant, per_row = trial.footprint(recordings).flops(made.length)
            reference[checkpointing] = (constant + made.batch * per_row) / (made.batch * made.length)


def _cost(
    footprint: Footprint,
    title: str,
    base: Base,
    checkpointing: bool,
    counts: Counts,
    made: Plan,
    reference: dict[bool, float],
) -> Cost:
    rows, length = made.batch, made.length
    memory = footprint.memory(rows, length)
    constant, per_row = footprint.flops(length)
    flops = (constant + rows * per_row) / (rows * length)
    budget = None if made.capacity is None else (1 - HEADROOM) * made.capacity
    return Cost(
        method=title,
        base=base.name,
        checkpointing=checkpointing,
        trained=counts.trained,
        stored=counts.stored,
        file_bytes=counts.file_bytes,
        memory=memory,
        host_bytes=footprint.optimizer.host,
        held_bytes=footprint.held(rows, length),
        flops_per_token=flops,
        step_vs_full=flops / reference.get(checkpointing, flops),
        fits=None if budget is None else memory.total <= budget,
        largest_batch=None if budget is None else footprint.largest_batch(length, budget),
        largest_length=None if budget is None else _capped(footprint.largest_length(rows, budget), made.positions),
    )


def _capped(length: int | None, most: int | None) -> int | None:
    return length if length is None or most is None else min(length, most)


def bytes_of(text: str | int | None) -> int | None:
    """Bytes from "24GB", "24 GiB", "800MB" or a number. Units are powers of 1024, as memory is sold.

    Raises:
        ConfigError: it is none of these.
    """
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        raise ConfigError(f"gpu={text!r} is no amount of memory; write 24GB")
    unit: int = 1024 ** " kmgt".find(found[2] or " ")
    amount = round(float(found[1]) * unit)
    if amount < 1 << 20:
        raise ConfigError(f"gpu={text!r} is {amount} bytes, on which nothing fits; write 24GB")
    return amount
