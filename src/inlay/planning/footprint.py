"""The memory of a training step as a function of rows and tokens, from recordings of it at a few lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from inlay.errors import ConfigError, nearest
from inlay.planning.timeline import GRADIENT, HELD, SCRATCH, Timeline

MOST = 1 << 24
"""Where the search for a largest batch or length ends."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device when a step needs most, by cause.

    Attributes:
        weights: of the base and the adapter.
        gradients: of what is trained, as far as they are there at that moment.
        optimizer: its state on the device, from the second step on.
        activations: what the forward pass keeps for the backward pass, as far as it is there at that moment.
        scratch: everything else: results on their way, the buffer in which 4-bit weights are decoded.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.scratch


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """Bytes of an optimizer: on the device, in host memory, and only while it steps."""

    device: int
    host: int = 0
    stepping: int = 0


def optimizer_state(parameters: Sequence[nn.Parameter], name: str, device: str) -> OptimizerState:
    """What the optimizer called `name` keeps for these parameters.

    Moments are counted in fp32, as they are for an adapter's parameters whatever the base.

    Raises:
        ConfigError: an unknown name.
    """
    count = sum(p.numel() for p in parameters)
    large = sum(p.numel() for p in parameters if p.numel() >= PAGED_FROM)
    match name:
        case "adamw_torch":
            # One more copy while the whole list of parameters is updated at once; a CPU takes them one by one.
            widest = max((p.numel() for p in parameters), default=0)
            return OptimizerState(8 * count, stepping=4 * (count if device == "cuda" else widest))
        case "adamw_torch_fused":
            return OptimizerState(8 * count)
        case "paged_adamw_32bit" if device == "cuda":
            return OptimizerState(8 * (count - large), 8 * large, min(8 * large, PAGE_BUDGET))
        case "paged_adamw_32bit":
            return OptimizerState(8 * count)
        case "adamw_8bit" | "paged_adamw_8bit":
            small = sum(p.numel() for p in parameters if p.numel() < 4096)  # bitsandbytes keeps those in 32 bits
            eight = round((count - small) * (2 + 8 / 256))  # with a scale for each block of 256
            paged = name.startswith("paged") and device == "cuda"
            return OptimizerState(8 * small, eight) if paged else OptimizerState(8 * small + eight)
        case "adafactor":
            return OptimizerState(sum(4 * (sum(p.shape[-2:]) if p.ndim >= 2 else p.numel()) for p in parameters))
        case "sgd":
            return OptimizerState(4 * count)
    raise ConfigError(f"optim={name!r} is not known: {nearest(name, OPTIMIZERS)}")


PAGED_FROM, PAGE_BUDGET = 100_000, 256 << 20
"""Defaults of `PagedAdamW`: elements from which moments are paged, bytes of them on the device at a time."""

OPTIMIZERS = (
    "adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd",
)  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """What a step needs, for any number of rows and any length.

    Attributes:
        weights: bytes of base and adapter.
        gradients: bytes of all gradients.
        optimizer: see `OptimizerState`.
        scratch: bytes that are there all the time for temporary use.
        recordings: timelines by length; memory at other lengths is interpolated (exactly: sizes are polynomials in the
            length) where their order of events is the same.
        accumulates: gradients of earlier batches are there during the forward pass.
    """

    weights: int
    gradients: int
    optimizer: OptimizerState
    scratch: int
    recordings: Mapping[int, Timeline]
    accumulates: bool = False

    def memory(self, rows: int, length: int) -> Memory:
        """At the moment when most is needed.

        Raises:
            ConfigError: no recording tells what that length takes.
        """
        live = self._live(rows, length)
        if self.accumulates:
            live[:, GRADIENT] = self.gradients
        at = live[int(live.sum(1).argmax())].tolist()
        kept, state = self.weights, self.optimizer
        step = Memory(kept, int(at[GRADIENT]), state.device, int(at[HELD]), max(0, round(at[SCRATCH])) + self.scratch)
        update = Memory(kept, self.gradients, state.device, 0, state.stepping + self.scratch)
        return max(step, update, key=lambda memory: memory.total)

    def held(self, rows: int, length: int) -> int:
        """Bytes that the forward pass leaves for the backward pass."""
        weights = self._weights(length)
        return round(sum(w * (t.held[0] + rows * t.held[1]) for w, t in zip(weights, self._kept(), strict=True)))

    def flops(self, length: int) -> tuple[float, float]:
        """(constant, per row) multiplications and additions of a step."""
        parts = list(zip(self._weights(length), self._kept(), strict=True))
        return sum(w * t.flops[0] for w, t in parts), sum(w * t.flops[1] for w, t in parts)

    @property
    def any_length(self) -> bool:
        """Whether there are recordings enough, of one order of events, to tell other lengths."""
        return len(self.recordings) > 2 and len({hash(t.order) for t in self.recordings.values()}) == 1

    def largest_batch(self, length: int, budget: float) -> int:
        """The most rows of `length` tokens that stay within `budget` bytes; 0 where not even one does."""
        return _most(lambda rows: self.memory(rows, length).total <= budget)

    def largest_length(self, rows: int, budget: float) -> int | None:
        """The most tokens of `rows` rows within `budget` bytes; None where lengths cannot be told."""
        return _most(lambda length: self.memory(rows, length).total <= budget) if self.any_length else None

    def _kept(self) -> list[Timeline]:
        return list(self.recordings.values())

    def _weights(self, length: int) -> list[float]:
        """Lagrange's weights of the recordings for a length."""
        known = list(self.recordings)
        if length in self.recordings:
            return [float(k == length) for k in known]
        if not self.any_length:
            raise ConfigError(f"a step was recorded at {known} tokens only, which does not tell {length}.")
        return [float(np.prod([(length - j) / (k - j) for j in known if j != k])) for k in known]

    def _live(self, rows: int, length: int) -> NDArray[np.float64]:
        used = [(w, t) for w, t in zip(self._weights(length), self._kept(), strict=True) if w]
        total = sum(w * (t.constant + rows * t.per_row.astype(np.float64)) for w, t in used)
        assert not isinstance(total, int), "a length is told from a recording"
        for same in zip(*(t.capped for _, t in used), strict=True):  # one tensor, as it was recorded at each length
            born, died, _, most = same[0]
            grown = rows * sum(w * per_row for (w, _), (_, _, per_row, _) in zip(used, same, strict=True))
            total[born:died, SCRATCH] += min(most, grown)
        return total


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where every smaller one does."""
    low, high = 0, 1
    while high < MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
