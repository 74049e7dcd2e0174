"""The mask of `philox` inside Triton kernels."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are read by Triton, which gives parameter annotations a meaning of its own.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_block(seed, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """keep[len(rows), COLUMNS] for the columns from `first_column`, a multiple of 4, on."""
    groups = first_column // 4 + tl.arange(0, COLUMNS // 4)
    zero = tl.zeros([rows.shape[0], COLUMNS // 4], tl.int32)
    row, group = rows[:, None] + zero, groups[None, :] + zero
    w0, w1, w2, w3 = tl.philox(seed, row, group, zero, zero)
    # join stacks along a new last axis, so that the flat order of the last two is w0, w1, w2, w3.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return (words >> 1).to(tl.int32, bitcast=True) >= threshold
