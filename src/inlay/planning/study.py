"""What each method costs on one model: counts, recordings of a step, and footprints made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inlay.adapter import Adapter, attach
from inlay.describe import base_parameters
from inlay.errors import InlayError, MethodError
from inlay.methods.base import Method
from inlay.planning.bases import BASES, Base, decoding_bytes, quantised_leaves, stored_bytes, weight_bytes
from inlay.planning.footprint import Footprint, OptimizerState, optimizer_state
from inlay.planning.skeleton import empty_model, file_bytes
from inlay.planning.step import Conditions, Device, make_inputs, record
from inlay.planning.timeline import Timeline


@dataclass(frozen=True)
class Settings:
    """What is the same for all methods of a plan."""

    task: str
    length: int
    target_length: int | None
    device: Device
    optim: str
    accumulates: bool


@dataclass(frozen=True)
class Counts:
    """Size of an adapter: trained and stored values, and bytes of its file."""

    trained: int
    stored: int
    file_bytes: int


class Study:
    """The models of one configuration, one for each dtype, and what was recorded with them."""

    def __init__(self, model_config: Any, settings: Settings) -> None:
        self.config, self.settings = model_config, settings
        self._models: dict[torch.dtype, nn.Module] = {}
        self._leaves: dict[str, dict[str, nn.Module]] = {}
        self._weights: dict[str, int] = {}

    @property
    def parameters(self) -> int:
        """Parameters of the base."""
        return base_parameters(self.model(BASES["bf16"]))

    def model(self, base: Base) -> nn.Module:
        """The empty model that computes as the base does."""
        if base.compute not in self._models:
            self._models[base.compute] = empty_model(self.config, self.settings.task, base.compute)
        return self._models[base.compute]

    def weights(self, base: Base) -> int:
        """Bytes of the base.

        Raises:
            QuantizationError: it cannot be stored like that.
        """
        if base.name not in self._weights:
            model = self.model(base)
            self._leaves[base.name] = quantised_leaves(model, base)
            self._weights[base.name] = weight_bytes(model, base, self._leaves[base.name])
        return self._weights[base.name]

    @contextlib.contextmanager
    def attached(self, method: Method | None, base: Base) -> Iterator[Trial]:
        """The model of a base with a method attached; with None every parameter is trained where it is.

        Raises:
            InlayError: the method cannot work on this model, or the base cannot be stored like that.
        """
        weights, model = self.weights(base), self.model(base)
        before = stored_bytes(model)
        if method is None:
            requires = [(p, p.requires_grad) for p in model.parameters()]
            try:
                for parameter, _ in requires:
                    parameter.requires_grad_(True)
                yield Trial(self, base, model, None, weights)
            finally:
                for parameter, required in requires:
                    parameter.requires_grad_(required)
            return
        adapter = attach(model, method)
        try:
            yield Trial(self, base, model, adapter, weights + stored_bytes(model) - before)
        finally:
            adapter.detach()


class Trial:
    """A method on a base: what can be asked while it is attached."""

    def __init__(self, study: Study, base: Base, model: nn.Module, adapter: Adapter | None, weights: int) -> None:
        self.study, self.base, self.model, self.adapter, self.weights = study, base, model, adapter, weights
        self.trained = [p for p in model.parameters() if p.requires_grad]

    @property
    def counts(self) -> Counts:
        """Trained and stored values; for full fine-tuning in place the file is the model."""
        if self.adapter is None:
            whole = dict(self.model.named_parameters())
            count = sum(p.numel() for p in whole.values())
            return Counts(count, count, file_bytes({name: p.detach() for name, p in whole.items()}))
        stored = self.adapter.stored()
        return Counts(self.adapter.trained_parameters, self.adapter.stored_parameters, file_bytes(stored))

    @property
    def optimizer(self) -> OptimizerState:
        """The optimizer's state."""
        return optimizer_state(self.trained, self.study.settings.optim, self.study.settings.device)

    def record(self, checkpointing: bool, lengths: Sequence[int]) -> dict[int, Timeline]:
        """Timelines of a step at these lengths."""
        settings, leaves = self.study.settings, self.study._leaves[self.base.name]
        int8 = leaves.values() if self.base.bits == 8 and self.adapter is not None else ()
        conditions = Conditions(
            device=settings.device,
            checkpointing=checkpointing,
            int8=frozenset(leaf.get_parameter("weight").untyped_storage()._cdata for leaf in int8),
        )

        def made(length: int) -> Timeline:
            try:
                inputs = make_inputs(settings.task, length, settings.target_length or length)
                return record(self.model, settings.task, inputs, conditions)
            except InlayError:
                raise
            except Exception as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise MethodError(f"a step of {length} tokens cannot be followed on this model: {reason}") from error

        found = {length: made(length) for length in lengths}
        first, *others = found.values()
        if others and first.order != others[0].order:
            found[lengths[0]] = made(lengths[0])  # pieces may keep something from their first step
        return found

    def footprint(self, recordings: dict[int, Timeline], base: Base | None = None) -> Footprint:
        """The footprint of recordings, on this base or on another that computes in the same way."""
        base = base or self.base
        study = self.study
        own = self.weights - study.weights(self.base)
        return Footprint(
            weights=study.weights(base) + own,
            gradients=sum(p.nbytes for p in self.trained),
            optimizer=self.optimizer,
            scratch=decoding_bytes(study._leaves[base.name], base),
            recordings=recordings,
            accumulates=study.settings.accumulates,
        )


def lengths_near(length: int, count: int) -> tuple[int, ...]:
    """The length itself, and others near it."""
    step = 8 if length >= 32 else -8  # shorter ones, which fit where the length does; longer for very short rows
    return tuple(length - step * i for i in range(count))


__all__ = ["Counts", "Settings", "Study", "Trial", "lengths_near"]
