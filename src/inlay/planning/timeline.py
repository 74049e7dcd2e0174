"""Every allocation of one training step, in order, with its size and its life: recorded on tensors without storage.

A model on the meta device runs through the same operators as a real one, and its tensors are born and die at the same
moments; only the values are missing. So the sum of what is alive after each operator is the memory that the step takes,
for any architecture and any method, without a formula for either.

The recorded step has an odd, large number of rows, so that a size that is a multiple of it belongs to the rows and any
other is the same for every batch: one recording holds for all batch sizes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROWS = 10007
"""Rows of a recorded step: a prime that divides no size of a model."""

Bytes = NDArray[np.int64]

HELD, GRADIENT, SCRATCH = 0, 1, 2
"""Kinds of storages: alive from the forward to the backward pass; a parameter's gradient; everything else."""


class Timeline:
    """What is alive after each operator of one step, [K, 3] bytes by kind, as constant + rows * per row.

    Attributes:
        constant: [K, 3], what does not depend on the number of rows.
        per_row: [K, 3], what each row adds.
        flops: multiplications and additions of matrix products and attention: (constant, per row).
        held: (constant, per row) of what is alive at the end of the forward pass, the activations.
        order: which storages are born and die when; equal for two recordings of the same program.
        capped: (born, died, bytes a row, bytes at most) of scratch that stops growing with the rows, not in the tables.
    """

    def __init__(
        self,
        constant: Bytes,
        per_row: Bytes,
        flops: tuple[int, int],
        held: tuple[int, int],
        order: tuple[tuple[int, int, int], ...],
        capped: tuple[tuple[int, int, int, int], ...] = (),
    ) -> None:
        self.constant, self.per_row = constant, per_row
        self.flops, self.held = flops, held
        self.order, self.capped = order, capped


class Recorder(TorchDispatchMode):
    """Records every operator that runs under it.

    Args:
        known: tensors that were there before and are counted elsewhere.
        all_is: what `all` of some condition comes to, since there are no values: models ask whether all tokens are
            real, all rows of one text. Any other condition (any NaN, any infinity) is false.
    """

    def __init__(self, known: Iterable[Tensor], *, all_is: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._all_is = all_is
        self._every: set[int] = set()
        self._alive: dict[int, Any] = {_key(t): None for t in known}
        self._born: list[int] = []
        self._died: list[int] = []
        self._size: list[int] = []
        self._index: dict[int, int] = {}
        self._cap: dict[int, int] = {}
        self._now = 0
        self._flops = [0, 0]
        self._forward_end: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SCALAR and args[0].dtype == torch.bool and args[0].is_meta:
            return self._all_is and _key(args[0]) in self._every
        out = func(*args, **(kwargs or {}))
        self._now += 1
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.add_flops(formula(args, kwargs or {}, out))
        if isinstance(out, Tensor):
            self._see(out)
            if func._overloadpacket is _aten.all:
                self._every.add(_key(out))
        elif isinstance(out, list | tuple):
            for item in out:
                if isinstance(item, Tensor):
                    self._see(item)
        return out

    def add_flops(self, count: int) -> None:
        """Counts work that no operator stands for."""
        self._flops[count % ROWS == 0] += count

    def cap(self, tensor: Tensor, most: int) -> None:
        """A tensor that holds a part of the rows at a time, and never takes more than `most` bytes."""
        self._cap[self._index[_key(tensor)]] = most

    def forward_ends(self) -> None:
        """Called between the forward and the backward pass: what is alive now is held for the latter."""
        self._now += 1  # what died since the last operator is not held
        self._forward_end = self._now

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        if size == 0:
            return
        index = len(self._size)
        self._born.append(self._now)
        self._died.append(-1)
        self._size.append(size)
        self._index[key] = index
        self._alive[key] = weakref.ref(storage, self._bury(key, index))

    def _bury(self, key: int, index: int) -> Callable[[Any], None]:
        def bury(_: Any) -> None:
            self._died[index] = self._now + 1
            self._alive.pop(key, None)
            self._every.discard(key)
            self._index.pop(key, None)

        return bury

    def timeline(self, parameters: Iterable[nn.Parameter]) -> Timeline:
        """What was recorded; called while the gradients of `parameters` are still there."""
        count = self._now + 2
        gradients = {
            self._index[_key(p.grad)] for p in parameters if p.grad is not None and _key(p.grad) in self._index
        }
        born = np.array(self._born, dtype=np.int64)
        died = np.array([d if d >= 0 else count - 1 for d in self._died], dtype=np.int64)
        end = self._forward_end if self._forward_end is not None else count
        kind = np.where((born <= end) & (died > end), HELD, SCRATCH)
        kind[list(gradients)] = GRADIENT
        rowwise = np.array([s % ROWS == 0 for s in self._size], dtype=bool)
        capped = np.array([i in self._cap for i in range(len(rowwise))], dtype=bool)
        amount = np.array([s // ROWS if r else s for s, r in zip(self._size, rowwise, strict=True)], dtype=np.int64)
        tables = []
        for wanted in (~rowwise & ~capped, rowwise & ~capped):
            change = np.zeros((count, 3), dtype=np.int64)
            np.add.at(change, (born[wanted], kind[wanted]), amount[wanted])
            np.add.at(change, (died[wanted], kind[wanted]), -amount[wanted])
            tables.append(change.cumsum(0))
        held = tuple(int(table[end, HELD]) for table in tables)
        order = tuple(zip(self._born, died.tolist(), kind.tolist(), strict=True))
        flops = self._flops[0], self._flops[1] // ROWS
        growing = tuple((int(born[i]), int(died[i]), int(amount[i]), most) for i, most in self._cap.items())
        return Timeline(tables[0], tables[1], flops, (held[0], held[1]), order, growing)


_aten = torch.ops.aten
_SCALAR = _aten._local_scalar_dense.default
"""What `bool(tensor)` and `tensor.item()` come down to."""


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


def _product(left: int, right: int) -> Formula:
    """2 M K N for the matrices at these places among the arguments, batched or not."""

    def formula(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        rows: int = math.prod(args[left].shape)
        return 2 * rows * int(args[right].shape[-1])

    return formula


def _registered(count: Callable[..., int]) -> Formula:
    return lambda args, kwargs, out: int(count(*args, **kwargs, out_val=out))


_FLOPS: dict[Any, Formula] = {packet: _registered(count) for packet, count in flop_registry.items()} | {
    _aten.mm: _product(0, 1),
    _aten.addmm: _product(1, 2),
    _aten.bmm: _product(0, 1),
    _aten.baddbmm: _product(1, 2),
}
"""Formulas of torch's own counter; those of matrix products without its detours, because they are called most."""
