"""FP4, a 4-bit float with one sign, two exponent and one mantissa bit (arXiv:2305.14314, section 3)."""

from __future__ import annotations

from typing import ClassVar

from inlay.quant.base import BlockQuantization, CodeBook

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by bit pattern, divided by 12 below

# The indices are bit patterns, not ranks, and zero has two of them. 0 stands before 8 among equals: which of
# the two zeros a value just below or above zero takes is part of the bytes on disk.
FP4_BOOK = CodeBook(
    "fp4",
    tuple(m / 12.0 for m in _MAGNITUDES) + tuple(-m / 12.0 for m in _MAGNITUDES),
    order=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
)


class FP4(BlockQuantization):
    """Frozen weights in 4-bit floating point: w ≈ FP4[index] · absmax(block).

    Coarser than `NF4` on normally distributed weights; here for files that were written with it.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    book: ClassVar[CodeBook] = FP4_BOOK
