"""NF4, the 4-bit NormalFloat of QLoRA (arXiv:2305.14314, section 3)."""

from __future__ import annotations

from typing import ClassVar

from inlay.quant.base import BlockQuantization, CodeBook

# Eight positive and seven negative quantiles of N(0, 1) at equal steps up to the tail 0.9677083, and zero,
# divided by the largest. Kept as fp32 literals: the normal quantile function would bring in scipy, and its
# last bit may change.
NF4_BOOK = CodeBook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022833334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)


class NF4(BlockQuantization):
    """Frozen weights in 4-bit NormalFloat: w ≈ NF4[index] · absmax(block).

    The code book holds quantiles of a normal distribution, so that all sixteen values are used equally often
    by normally distributed weights. Bytes, scales and files are those of bitsandbytes.

    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    book: ClassVar[CodeBook] = NF4_BOOK
