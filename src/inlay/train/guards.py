"""What must not pass in silence: nothing to learn in a batch, a loss that is no number, a tensor without gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from inlay.errors import TrainingError

GRADIENT_PATIENCE = 8
"""Steps after which a tensor without any gradient is an error."""

MOST_ROWS = 8


class Guards:
    """Checks of one run, with the names that make their messages useful.

    Args:
        parameters: the adapter's, by name.
        origin: row index -> where the row stands in the user's file.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], origin: Callable[[int], str]) -> None:
        self.parameters = parameters
        self.origin = origin
        self.without_gradient = set(parameters)

    def has_targets(self, targets: int, indices: Sequence[int], step: int, max_length: int | None) -> None:
        """Refuse a batch in which every label is masked: it would be logged as loss 0."""
        if targets == 0:
            raise TrainingError(
                f"step {step}: nothing in this batch is learnt from (all labels are masked): {self.rows(indices)}. "
                f"Most often the prompt alone fills max_length ({max_length}): raise it, or shorten the prompts."
            )

    def finite(
        self, loss: float, norm: float, step: int, rows: Callable[[], Sequence[int]], learning_rate: float
    ) -> None:
        """Refuse a loss or a gradient that is not a number, and say whose it is.

        Args:
            loss, norm: of this step.
            rows: the rows whose own loss is not finite, or all of the step where each alone is.
            learning_rate: the present one.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return
        broken = [name for name, p in self.parameters.items() if not bool(p.isfinite().all())]
        if broken:
            cause = f"the adapter is no longer finite ({', '.join(broken[:3])}): lower learning_rate"
        elif math.isfinite(loss):
            bad = [n for n, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
            cause = f"the gradient of {', '.join(bad[:3])} overflows: lower learning_rate, or set bf16: false"
        else:
            cause = "the adapter is finite, so the model overflows on these rows: look at them, or set bf16: false"
        raise TrainingError(
            f"step {step}: loss {loss}, norm of the gradient {norm}, learning_rate {learning_rate:.2e}. "
            f"Cause: {cause}. Rows: {self.rows(rows())}."
        )

    def note_gradients(self) -> None:
        """Remember which tensors have received a gradient."""
        if self.without_gradient:
            self.without_gradient -= {name for name, p in self.parameters.items() if p.grad is not None}

    def all_learn(self, steps_done: int, total_steps: int, task: str) -> None:
        """Refuse to go on with a tensor that no gradient reaches: it trains nothing, whatever the loss says."""
        if self.without_gradient and steps_done >= min(GRADIENT_PATIENCE, total_steps):
            names = sorted(self.without_gradient)
            raise TrainingError(
                f"step {steps_done}: {len(names)} of {len(self.parameters)} adapter tensors never received a gradient: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. The model does not use their sites for "
                f"{task}; choose `sites` that it runs."
            )

    def rows(self, indices: Sequence[int]) -> str:
        """Where rows stand in the user's files."""
        shown = "; ".join(self.origin(index) for index in list(indices)[:MOST_ROWS])
        return shown + (f"; and {len(indices) - MOST_ROWS} more" if len(indices) > MOST_ROWS else "")


def non_finite_rows(parts: Sequence[tuple[Sequence[Sequence[int]], Tensor]]) -> list[int]:
    """The examples of the rows whose own loss is not finite; all examples where no single row's is at fault.

    Args:
        parts: for each batch the examples in each row (several where they are packed) and the losses of the rows.
    """
    found = [
        index
        for rows, loss_B in parts
        for row in (~loss_B.isfinite()).nonzero().flatten().tolist()
        for index in rows[row]
    ]
    return found or [index for rows, _ in parts for row in rows for index in row]
