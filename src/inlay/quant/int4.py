"""Int4, fifteen equal steps and a second zero: the baseline of QLoRA's tables (arXiv:2305.14314, table 2)."""

from __future__ import annotations

from typing import ClassVar

from inlay.quant.base import BlockQuantization, CodeBook

# -7 ... 7, so that zero is exact and both ends are ±absmax; the sixteenth index is a second zero.
INT4_BOOK = CodeBook("int4", tuple(level / 7 for level in (*range(-7, 1), *range(8))))


class Int4(BlockQuantization):
    """Frozen weights in 4-bit integers: w ≈ index / 7 · absmax(block), index from -7 to 7.

    For comparison with `NF4`, which is closer to normally distributed weights. bitsandbytes has no such format: files
    are laid out like those of the others, `inlay.load_quantized` reads them, bitsandbytes refuses them.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    book: ClassVar[CodeBook] = INT4_BOOK
