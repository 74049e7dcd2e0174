"""Which examples are held out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def hold_out(groups: Ints, strata: Ints, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """A seeded split into `(train, held_out)`, both in the order of the data.

    Examples of one group (one row) stay together. Every stratum (class, source) gives its share: groups are shuffled,
    put in order of their stratum, and each `1/fraction`-th is taken. The only group of a stratum is never taken.

    Args:
        groups: a number per example, equal for examples that belong together.
        strata: a number per example; that of a group is its first example's.
        fraction: part of the groups to hold out, 0 ≤ fraction < 1; at least one group where it is above 0.
        seed: decides the split.
    """
    everything = np.arange(len(groups))
    if fraction <= 0:
        return everything, everything[:0]
    unique, first, member = np.unique(groups, return_index=True, return_inverse=True)
    if len(unique) < 2:
        return everything, everything[:0]
    shuffled = np.random.default_rng([seed, 0x5911]).permutation(len(unique))
    ordered = shuffled[np.argsort(strata[first][shuffled], kind="stable")]
    quota = np.floor(np.arange(1, len(ordered) + 1) * fraction + 1e-9)
    taken = np.diff(quota, prepend=0) > 0
    stratum = strata[first][ordered]
    _, which, size = np.unique(stratum, return_inverse=True, return_counts=True)
    taken &= size[which] > 1
    if not taken.any():
        taken[int(np.argmax(size[which]))] = True
    held = np.zeros(len(unique), bool)
    held[ordered[taken]] = True
    held_examples = held[member]
    return everything[~held_examples], everything[held_examples]
