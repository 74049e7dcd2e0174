"""Matrix products of an attention, whatever function computes them, and their axes in one standard order.

A product [.., R, I] x [.., I, C] -> [.., R, C] is written in many ways: `matmul`, `bmm` over batch and heads as one
axis, `baddbmm` with a bias, `einsum` with the batch anywhere. `read` tells what each axis is; `standard` and
`laid_out` go to [B, G, H, R, C] and back.

Legend: B batch, G further batch axes (1 mostly), H heads, R rows, I inner (summed) size, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMES = frozenset(("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"))
"""The functions that `read` knows."""

STACKED = {3: "m", 4: "bh", 5: "bgh"}
"""The leading axes of a product without an equation; m is batch and heads as one."""


@dataclass(frozen=True, eq=False)
class Product:
    """left x right -> result, with a letter for each axis: m or b, g, h; r, i and c.

    Attributes:
        factor: what the product is multiplied by.
    """

    left: Tensor
    right: Tensor
    left_axes: str
    right_axes: str
    out_axes: str
    factor: float = 1.0

    @property
    def swapped(self) -> Product:
        """The same product read from right to left: its columns are the rows."""
        turn = str.maketrans("rc", "cr")
        left, right, out = (a.translate(turn) for a in (self.right_axes, self.left_axes, self.out_axes))
        return Product(self.right, self.left, left, right, out, self.factor)

    def size(self, axis: str) -> int:
        """The size of an axis of the left factor."""
        return self.left.shape[self.left_axes.index(axis)]

    def heads(self, batch: int) -> int:
        """How many heads the left factor has where the batch has this many entries; 0 where that does not go up."""
        if "m" not in self.left_axes:
            return self.size("h")
        return 0 if self.size("m") % batch else self.size("m") // batch


def standard(x: Tensor, axes: str, batch: int) -> Tensor:
    """x as [B, G, H, ., .], the last two in the order r, i, c."""
    x = x.permute([axes.index(a) for a in "mbghric" if a in axes])
    if "m" in axes:
        return x.reshape(batch, 1, x.shape[0] // batch, *x.shape[1:])
    return x if "g" in axes else x.unsqueeze(1)


def laid_out(x: Tensor, axes: str) -> Tensor:
    """The inverse of `standard`."""
    order = [a for a in "mbghric" if a in axes]
    if "m" in axes:
        x = x.reshape(x.shape[0] * x.shape[2], *x.shape[3:])
    elif "g" not in axes:
        x = x.squeeze(1)
    return x.permute([order.index(a) for a in axes])


def read(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
    """The product that a call of one of `NAMES` computes, or None where it is none of two stacks of matrices."""
    if name == "einsum":
        return _equation(args)
    factor = 1.0
    if name == "baddbmm":
        names = ("input", "batch1", "batch2")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        left, right, factor = given.get("batch1"), given.get("batch2"), given.get("alpha", 1.0)
    else:
        both = [*args, *(kwargs[n] for n in ("other", "mat2", "tensor2") if n in kwargs)]
        if len(both) != 2:
            return None
        left, right = reversed(both) if name == "__rmatmul__" else both
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if left.ndim != right.ndim or left.ndim not in STACKED:
        return None
    stack = STACKED[left.ndim]
    return Product(left, right, stack + "ri", stack + "ic", stack + "rc", float(factor))


def _equation(args: Sequence[Any]) -> Product | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    stack = [a for a in out if a in left and a in right]
    inner, rows, columns = set(left) & set(right) - set(out), set(left) - set(right), set(right) - set(left)
    wanted = rows <= set(out) and columns <= set(out) and len(set(out)) == len(stack) + 2
    if not wanted or any(len(s) != 1 for s in (inner, rows, columns)) or len(stack) not in (1, 2, 3):
        return None
    letters = dict(zip(stack, STACKED[len(stack) + 2], strict=True))
    letters |= {inner.pop(): "i", rows.pop(): "r", columns.pop(): "c"}
    turn = str.maketrans(letters)
    return Product(operands[0], operands[1], left.translate(turn), right.translate(turn), out.translate(turn))


__all__ = ["NAMES", "Product", "laid_out", "read", "standard"]
