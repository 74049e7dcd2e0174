"""One value that is kept until what it was computed from changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from inlay import stepping

T = TypeVar("T")


class Memo(Generic[T]):
    """Remembers one value for as long as its key stays equal. A copy or a pickle starts empty."""

    def __init__(self) -> None:
        stepping.start()
        self._key: tuple[object, ...] | None = None
        self._value: T | None = None

    def get(self, key_of: Callable[[], tuple[object, ...]], make: Callable[[], T]) -> T:
        """The value for this key, made now if it is not the one that is kept.

        Inside a compiled graph nothing is kept: a version counter is no constant that a graph may rely on.
        """
        if torch.compiler.is_compiling():
            return make()
        key = key_of()
        if self._key != key or self._value is None:
            self._value = make()
            self._key = key
        return self._value

    def __reduce__(self) -> tuple[type[Memo[Any]], tuple[()]]:
        return Memo, ()


def versions(*tensors: Tensor) -> tuple[object, ...]:
    """Changes whenever one of the tensors was written to, moved, or may have been updated by an optimizer.

    Version counters see every write but those through `.data`, which some optimizers use: so each step of any optimizer
    counts as a change. What escapes is a write through `.data` by hand.
    """
    stepping.start()  # else no step would be counted, and fused optimizers change no version counter
    return stepping.count(), *((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)
