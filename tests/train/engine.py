"""A run in a few milliseconds: a tiny frozen network with a trained head, and batches of unequal targets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay.config import RunConfig
from inlay.train.loop import Loop
from inlay.train.progress import Display
from inlay.train.trackers import JsonLines

CLASSES = 4


class Net(nn.Module):
    """Tagger over 8-dimensional tokens: a frozen mixing layer with dropout, a trained head."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.base = nn.Linear(8, 16).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.dropout(torch.tanh(self.base(x)))))


class HeadAdapter:
    """The protocol of `inlay.Adapter`, over the head alone."""

    def __init__(self, model: Net) -> None:
        self.model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.head.named_parameters(prefix="head")

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.head.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"head.{k}": v for k, v in self.model.head.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.head.load_state_dict({k.removeprefix("head."): v for k, v in state.items()})

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        save_file({k: v.clone() for k, v in self.state_dict().items()}, path / "adapter.safetensors")


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    indices: list[int]
    targets: int

    @property
    def rows(self) -> list[list[int]]:
        return [[index] for index in self.indices]


class Rows:
    """`count` rows of 3 to 9 tokens, shuffled anew each epoch; row i is the same in every batch it stands in."""

    def __init__(self, count: int = 20, batch: int = 3, *, seed: int = 1, shuffle: bool = True) -> None:
        self.count, self.batch, self.seed, self.shuffle = count, batch, seed, shuffle
        generator = torch.Generator().manual_seed(seed)
        self.lengths = [3 + i % 7 for i in range(count)]
        self.x = [torch.randn(n, 8, generator=generator) for n in self.lengths]
        self.labels = [torch.randint(0, CLASSES, (n,), generator=generator) for n in self.lengths]

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def epoch(self, n: int, start: int = 0, step: int = 1) -> Iterator[Batch]:
        order = list(range(self.count))
        if self.shuffle:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + n)).tolist()
        for at in range(start, len(self), step):
            yield self.rows(order[at * self.batch : (at + 1) * self.batch])

    def rows(self, indices: list[int]) -> Batch:
        longest = max(self.lengths[i] for i in indices)
        x = torch.zeros(len(indices), longest, 8)
        labels = torch.full((len(indices), longest), -100)
        for row, i in enumerate(indices):
            x[row, : self.lengths[i]] = self.x[i]
            labels[row, : self.lengths[i]] = self.labels[i]
        return Batch({"x": x, "labels": labels}, indices, int((labels != -100).sum()))


def config(**keys: Any) -> RunConfig:
    """A resolved configuration."""
    values: dict[str, Any] = {
        "model": "m",
        "data": "d",
        "task": "token-classification",
        "learning_rate": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "num_train_epochs": 2.0,
        "bf16": False,
        "metric_for_best_model": "loss",
    }
    return RunConfig(**(values | keys))


def loop(run: Path | None = None, *, rows: Rows | None = None, dropout: float = 0.2, **keys: Any) -> Loop:
    """A loop that is ready to `fit`, always from the same start."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = Net(dropout)
    data = rows or Rows()
    held_out = Rows(9, 9, seed=7, shuffle=False)
    settings = config(**keys)

    def evaluate(step: int) -> dict[str, dict[str, float]]:
        batch = next(held_out.epoch(0))
        with torch.no_grad():
            logits = model(batch.inputs["x"]).logits.flatten(0, 1)
        return {"held-out": {"loss": float(nn.functional.cross_entropy(logits, batch.inputs["labels"].flatten()))}}

    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
    return Loop(
        model=model,
        adapter=HeadAdapter(model),
        config=settings,
        train=data,
        origin=lambda index: f"train.jsonl:{index + 1}",
        tokens=lambda index: data.lengths[index],
        evaluate=evaluate if settings.eval_steps else None,
        accelerator=Accelerator(cpu=True, mixed_precision="no"),
        display=Display(Console(file=io.StringIO(), force_terminal=False), 1, quiet=True),
        trackers=[JsonLines(run / "metrics.jsonl")] if run is not None else [],
        run=run,
        identity={"seed": 0},
    )
