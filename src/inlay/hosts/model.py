"""The host on the model itself: it checks that a route fits the batch, and puts virtual tokens into it.

`forward` and `generate` keep their signatures, for trainers and `generate` read them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.hosts.base import Host, Hosted, follow_dispatch, hosted_class
from inlay.hosts.rerun import remember, restore
from inlay.hosts.saving import SavingHost, leave
from inlay.padding import Padding
from inlay.route import Group


class ModelHost(SavingHost):
    """Swapped in as the model's class while rows of a batch may differ or virtual tokens are served."""

    takes: ClassVar[tuple[str, ...]] = ()
    """The names of the arguments of the model's own forward, in order."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _around_forward(cls, _forward)
        own: Any = cls.__dict__.get("base")
        if not hasattr(own, "generate"):
            return

        @functools.wraps(own.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _generate(self, super().generate, args, kwargs)  # type: ignore[misc]

        cls.generate = generate  # type: ignore[attr-defined]

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> Any:
        """The model itself carries no pieces."""
        del state, groups

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        make = super()._get_logits_processor  # type: ignore[misc]
        job = self.__dict__.get("_inlay_job")
        if job is None:
            return make(*args, **kwargs)
        from inlay.hosts.generation import text_processors

        return text_processors(job, make, args, kwargs)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        job = self.__dict__.get("_inlay_job")
        if job is None:
            return made
        from inlay.hosts.generation import text_criteria

        return text_criteria(job, made)

    @staticmethod
    def leave(model: nn.Module) -> None:
        """Gives the model, and its encoder, their own classes back, if they are hosted."""
        encoder = _encoder(model)
        if isinstance(encoder, EncoderHost):
            encoder.__dict__.pop(PADDING)
            encoder.__class__ = type(encoder).base
            follow_dispatch(encoder)
        leave(model)
        follow_dispatch(model)


class EncoderHost(Host):
    """Swapped in as an encoder's class where gates need to know its padding: `generate` calls encoders directly."""

    takes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _around_forward(cls, _encode)


def _encode(encoder: Any, frozen: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    encoder.__dict__[PADDING].set(_named(encoder.takes, args, kwargs).get("attention_mask"))
    return frozen(*args, **kwargs)


def _around_forward(cls: Any, run: Any) -> None:
    """Gives a host class a forward with the signature of its module's own, which `run(module, frozen, ...)` answers."""
    own = cls.__dict__.get("base")
    if own is None:
        return
    cls.takes = _arguments(own.forward)

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, super(cls, self).forward, args, kwargs)

    cls.forward = forward


PADDING = "_inlay_padding"


def tell_padding(model: nn.Module, padding: Padding) -> None:
    """Has the model, and its encoder where it has one, say which positions are padding before they run."""
    hosts_rows(model)
    encoder = _encoder(model)
    if encoder is not None and not isinstance(encoder, Host):
        encoder.__dict__[PADDING] = padding
        encoder.__class__ = hosted_class(EncoderHost, type(encoder))
        follow_dispatch(encoder)


def _encoder(model: nn.Module) -> nn.Module | None:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    return encoder if isinstance(encoder, nn.Module) else None


def _forward(model: Any, frozen: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = model.__dict__["_inlay_state"]
    generating = model.__dict__.get("_inlay_generating", False)
    if state.batch is not None and not generating:
        check_rows(state.batch, args, kwargs)

    restore(state)

    def run(**given: Any) -> Any:
        mask = given.get("attention_mask")
        state.padding.set(mask)
        try:
            result = frozen(**given)
            remember(state, mask, result)
            return result
        except IndexError as error:
            raise AdapterError(
                f"{type(model).__name__} cannot index something by these rows ({error}): either virtual tokens make "
                "them longer than it has positions, or it looks token ids up in more places than its embedding, and "
                "then prompt methods cannot be used with it."
            ) from error
        finally:
            state.padding.forget()

    serving = state.serving
    if serving is None:
        mask = _named(model.takes, args, kwargs).get("attention_mask")
        state.padding.set(mask)
        try:
            result = frozen(*args, **kwargs)
            remember(state, mask, result)
            return result
        finally:
            state.padding.forget()
    given = _named(model.takes, args, kwargs)
    if not generating:
        from inlay.hosts import prompted

        return prompted.run(model, run, given, serving)
    serving.plan.absent = not model.__dict__["_inlay_job"].read(given)
    try:
        return run(**given)
    finally:
        serving.plan.absent = False


def _generate(model: Any, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Inside `generate`, beams repeat rows, and the steps after the first see only new tokens."""
    state = model.__dict__["_inlay_state"]
    if model.__dict__.get("_inlay_generating", False):
        return base(*args, **kwargs)
    if state.batch is not None:
        check_rows(state.batch, args, kwargs)
    model.__dict__["_inlay_generating"] = True
    try:
        if state.serving is None:
            return base(*args, **kwargs)
        from inlay.hosts import generation

        return generation.run(model, base, _named(_arguments(base, bound=True), args, kwargs), state.serving)
    finally:
        model.__dict__.pop("_inlay_generating", None)
        model.__dict__.pop("_inlay_job", None)


def _arguments(function: Any, *, bound: bool = False) -> tuple[str, ...]:
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    names = tuple(n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds)
    return names if bound else names[1:]


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    if len(args) > len(names):
        raise TypeError(f"forward() takes {len(names)} positional arguments but {len(args)} were given")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_rows(rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a batch whose number of rows is not the number of names given to `use`.

    Raises:
        AdapterError: they differ.
    """
    names = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "attention_mask")
    tensor = next((a for a in args if isinstance(a, Tensor)), None)
    if tensor is None:
        tensor = next((kwargs[n] for n in names if isinstance(kwargs.get(n), Tensor)), None)
    if tensor is not None and tensor.shape[0] != rows:
        raise AdapterError(
            f"use() was given {rows} rows, but the batch has {tensor.shape[0]}: give one entry per row, or one for all."
        )


def hosts_rows(model: nn.Module) -> None:
    """Makes a model a host, once."""
    if isinstance(model, ModelHost):
        return
    leave(model)
    if isinstance(model, SavingHost) or not isinstance(model, Host):  # fully_shard puts its class over a saving host
        model.__class__ = hosted_class(ModelHost, type(model))
        follow_dispatch(model)
