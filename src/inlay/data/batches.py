"""Batches in an order that (seed, epoch) alone decides, and that can be entered at any batch at once.

Legend: B rows, T tokens, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inlay.data.encoded import Encoded
from inlay.data.examples import MASKED
from inlay.data.formats import ANSWERING, CAUSAL, REGRESSION, SEQ2SEQ, SEQUENCE, TOKEN
from inlay.data.packing import Layout, first_fit_decreasing, pack
from inlay.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from inlay.verbalizer import Verbalizer

Ints = NDArray[np.int64]

POOL = 50
"""Batches that are drawn together and then sorted by length: random enough, and hardly any padding."""


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        inputs: what `model(**inputs)` takes, labels included.
        indices: the examples in it, by number; for packed sequences one after another.
        targets: tokens that are learned; rows for classification, regression and spans.
        rows: the examples in each row of the tensors; several where they are packed.
    """

    inputs: dict[str, Tensor]
    indices: list[int]
    targets: int
    rows: list[list[int]]


class Batches:
    """The batches of a set of examples.

    Args:
        encoded: the examples. With `encoded.packing`, a row of a batch is a sequence of up to `encoded.max_length`
            tokens packed from several of them.
        batch_size: rows per batch.
        seed: with the epoch, decides the order.
        shuffle: a new order each epoch; otherwise always the same, by length or as in the data.
        drop_last: leave out the last batch of an epoch where it is not full. Off: nothing is dropped.
        group_by_length: put rows of similar length together, the longest batch first, so that a run which does not fit
            into memory fails at its first step.
        pad_to_multiple_of: rounds up the width of batches, never above `encoded.max_length`.
        pad_token_id: fills up rows; masked where the model takes a mask.
        task: decides what labels are.
        device: where the tensors go.
        words: of a language model that answers with a word: which words stand for the classes. Each row then holds
            `answer_at` [B], the position that is read, and `answer_ids` [B, C, W], the words of each class (-1: none).
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 8,
        pad_token_id: int,
        task: str,
        device: torch.device | str | None = None,
        words: Verbalizer | None = None,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected 1 or more")
        if encoded.packing and task != CAUSAL:
            raise DataError(f"packing puts texts for {CAUSAL} together; the task is {task}. Set packing to false.")
        self.encoded, self.batch_size, self.seed, self.task = encoded, batch_size, seed, task
        self.layout: Layout = "mask"
        """What keeps packed examples apart; see `inlay.data.packing.find_layout`."""
        self.mask_dtype: torch.dtype | None = None
        self._shuffle, self._drop_last, self._grouped = shuffle, drop_last, group_by_length
        self._multiple, self._pad, self._device = pad_to_multiple_of, pad_token_id, device
        self._words = words
        self._plan: tuple[int, list[list[Ints]]] | None = None

    def __len__(self) -> int:
        """Batches per epoch (of epoch 0, where sets with weights are packed and epochs differ by a few)."""
        return len(self.plan(0))

    def plan(self, epoch: int) -> list[list[Ints]]:
        """The numbers of the examples of each batch of an epoch: one array, or one per sequence of packed ones."""
        if not self._shuffle:
            epoch = 0
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self._make_plan(epoch)
        return self._plan[1]

    def epoch(self, n: int, start: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every `step`-th batch of epoch `n` from batch `start` on; nothing else is read."""
        for index in range(start, len(self.plan(n)), step):
            yield self.batch(n, index)

    def batch(self, epoch: int, index: int) -> Batch:
        """One batch."""
        rows = [[int(i) for i in row] for row in self.plan(epoch)[index]]
        indices = [i for row in rows for i in row]
        if self.encoded.packing:
            inputs = self._pack([[self.encoded[i] for i in row] for row in rows])
            rows = [indices] if self.layout == "flat" else rows
        else:
            rows = [[i] for i in indices]
            limit = max(self.encoded.max_length, int(self.encoded.lengths[indices].max()))
            inputs = collate([self.encoded[i] for i in indices], self.task, self._pad, self._multiple, limit)
        if self._words is not None:
            inputs |= _answers(self._words, inputs)
        targets = count_targets(inputs, self.task, len(indices))
        if self._device is not None:
            inputs = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
        return Batch(inputs, indices, targets, rows)

    def state(self, epoch: int, index: int) -> dict[str, Any]:
        """What a checkpoint needs to go on with batch `index` of an epoch, and to see that it is the same data."""
        return {"epoch": epoch, "index": index, **self._identity()}

    def resume(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """`(epoch, index)` of a state.

        Raises:
            DataError: these are not the batches that the state belongs to; says what differs.
        """
        mine = self._identity()
        different = [f"{key} was {state.get(key)!r}, is {mine[key]!r}" for key in mine if state.get(key) != mine[key]]
        if different:
            raise DataError(f"the batches are not those of the checkpoint: {'; '.join(different)}")
        return int(state["epoch"]), int(state["index"])

    def _identity(self) -> dict[str, Any]:
        lengths = hashlib.sha256(self.encoded.lengths.tobytes()).hexdigest()[:16]
        return {
            "examples": len(self.encoded),
            "lengths": lengths,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "group_by_length": self._grouped,
            "drop_last": self._drop_last,
            "packing": self.encoded.packing,
        }

    def _make_plan(self, epoch: int) -> list[list[Ints]]:
        order = self.encoded.order(self.seed, epoch) if self._shuffle else np.arange(len(self.encoded))
        lengths = self.encoded.lengths[order]
        if self.encoded.packing:
            bins = [order[row] for row in first_fit_decreasing(lengths, self.encoded.max_length)]
            if self._shuffle:
                bins = [bins[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(bins))]
            batches = [bins[at : at + self.batch_size] for at in range(0, len(bins), self.batch_size)]
        else:
            batches = [[chunk] for chunk in self._chunks(order, lengths, epoch)]
        if self._drop_last and batches:
            last = batches[-1]
            if len(last if self.encoded.packing else last[0]) < self.batch_size:
                batches.pop()
        return batches

    def _chunks(self, order: Ints, lengths: NDArray[np.int32], epoch: int) -> list[Ints]:
        size = self.batch_size
        if not self._grouped:
            return [order[at : at + size] for at in range(0, len(order), size)]
        pool = size * POOL if self._shuffle else max(len(order), 1)
        chunks = []
        for at in range(0, len(order), pool):
            inside = order[at : at + pool][np.argsort(-lengths[at : at + pool], kind="stable")]
            chunks += [inside[i : i + size] for i in range(0, len(inside), size)]
        if not self._shuffle or not chunks:
            return chunks
        # The batch that is not full stays last, where drop_last and the end of an epoch expect it.
        full = [chunk for chunk in chunks if len(chunk) == size]
        rest = [chunk for chunk in chunks if len(chunk) < size]
        full = [full[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(full))]
        if full:
            longest = max(range(len(full)), key=lambda i: int(self.encoded.lengths[full[i]].max()))
            full[0], full[longest] = full[longest], full[0]
        return full + rest

    def _pack(self, rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
        widest = max(sum(len(example["input_ids"]) for example in row) for row in rows)
        width = min(_rounded(widest, self._multiple), self.encoded.max_length)
        return pack(rows, pad_token_id=self._pad, width=width, layout=self.layout, mask_dtype=self.mask_dtype)


def collate(
    examples: Sequence[Mapping[str, Any]], task: str, pad_token_id: int, multiple: int, limit: int
) -> dict[str, Tensor]:
    """Tensors of some examples, padded on the right.

    Args:
        examples: what `Encoded` yields.
        task: decides what labels are.
        pad_token_id: fills `input_ids`; labels are filled with -100.
        multiple: widths are rounded up to a multiple of this.
        limit: and are not rounded above this.

    Returns:
        `input_ids` and `attention_mask` [B, T]; `token_type_ids` [B, T] where there are any; and, where the examples
        have them, `labels`: [B, T] for tokens, [B] of classes, [B] or [B, C] of floats for numbers and sets of classes;
        `start_positions` and `end_positions` [B] for spans.
    """
    import torch

    def padded(name: str, fill: int) -> Tensor:
        rows = [example[name] for example in examples]
        width = max(len(row) for row in rows)
        tensor = torch.full((len(rows), max(width, min(_rounded(width, multiple), limit))), fill, dtype=torch.long)
        for i, row in enumerate(rows):
            tensor[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return tensor

    inputs = {"input_ids": padded("input_ids", pad_token_id)}
    width = inputs["input_ids"].shape[1]
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    inputs["attention_mask"] = (torch.arange(width)[None, :] < lengths[:, None]).long()
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = padded("token_type_ids", 0)
    if "start_positions" in examples[0]:
        for name in ("start_positions", "end_positions"):
            inputs[name] = torch.tensor([example[name] for example in examples])
    elif "labels" in examples[0]:
        if task in (SEQUENCE, REGRESSION):
            inputs["labels"] = torch.tensor([example["labels"] for example in examples])
        else:
            inputs["labels"] = padded("labels", MASKED)
    return inputs


def count_targets(inputs: Mapping[str, Tensor], task: str, rows: int) -> int:
    """How many targets the loss of a batch has: tokens for generation and tagging, rows otherwise; 0 without labels."""
    if task == ANSWERING:
        return rows if "start_positions" in inputs else 0
    if "labels" not in inputs:
        return 0
    if task in (CAUSAL, SEQ2SEQ, TOKEN):
        labels = inputs["labels"][:, 1:] if task == CAUSAL else inputs["labels"]  # nothing predicts a first token
        return int((labels != MASKED).sum())
    return rows


def _answers(words: Verbalizer, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a language model answers in each row, and the tokens of each class."""
    import torch

    at_B = words.positions(inputs, "last" if words.mask_id is None else "mask")
    ids_CW = torch.full((len(words.ids), max(map(len, words.ids))), -1)
    for number, ids in enumerate(words.ids):
        ids_CW[number, : len(ids)] = torch.tensor(ids)
    return {"answer_at": at_B, "answer_ids": ids_CW.repeat(len(at_B), 1, 1)}


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, *, left: bool, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of prompts for `generate`: padded on the left for decoders."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids_BT[i, where] = torch.tensor(list(prompt), dtype=torch.long)
        mask_BT[i, where] = 1
    return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}


def _rounded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple if multiple > 1 else width
