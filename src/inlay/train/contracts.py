"""What the loop asks of the data, of the adapter, and of whoever measures: anything of this form can be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """One batch: tensors for the model (with labels), the examples it holds, how many targets they have, and which of
    them stand in each row."""

    @property
    def inputs(self) -> dict[str, Tensor]: ...

    @property
    def indices(self) -> list[int]: ...

    @property
    def targets(self) -> int: ...

    @property
    def rows(self) -> list[list[int]]: ...


class Batches(Protocol):
    """The training data: `epoch(n, start)` yields the same batches for the same n, from batch `start` on.

    With `step`, which only several processes ask for, every `step`-th of them.
    """

    def __len__(self) -> int: ...

    def epoch(self, n: int, start: int = 0, step: int = 1) -> Iterator[Batch]: ...


class Adapter(Protocol):
    """What the loop needs of the adapter that it trains."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any: ...

    def save(self, path: Path) -> Any: ...


class EvaluationStopped(Exception):
    """A signal came while evaluating; the evaluation will be done again on resume."""


Evaluate = Callable[[int], dict[str, dict[str, float]]]
"""step -> metrics of each held-out set; must not touch any random state."""
