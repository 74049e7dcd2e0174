"""The host on the model itself: it checks that a route with one entry per row fits the batch."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.hosts.base import Host, Hosted, hosted_class
from inlay.route import Group


class ModelHost(Host):
    """Swapped in as the model's class while rows of a batch may differ or virtual tokens are served."""

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> Any:
        """The model itself carries no pieces."""
        del state, groups

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, after the check."""
        state = self.__dict__["_inlay_state"]
        if state.batch is not None and not self.__dict__.get("_inlay_generating", False):
            check_rows(state.batch, args, kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate; inside it, beams repeat rows."""
        state = self.__dict__["_inlay_state"]
        if state.batch is not None:
            check_rows(state.batch, args, kwargs)
        self.__dict__["_inlay_generating"] = True
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__.pop("_inlay_generating", None)

    @staticmethod
    def leave(model: nn.Module) -> None:
        """Gives the model its own class back, if it is hosted."""
        if isinstance(model, ModelHost):
            model.__class__ = type(model).base  # type: ignore[assignment]


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
    """Makes a model a host, once. Its `forward` keeps its signature: trainers and `generate` read it."""
    if isinstance(model, Host):
        return
    base = type(model)
    cls = hosted_class(ModelHost, base)
    if "forward" not in cls.__dict__:

        @functools.wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return ModelHost.forward(self, *args, **kwargs)

        cls.forward = forward
    model.__class__ = cls
