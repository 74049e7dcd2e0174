"""A set of examples as training sees it: numbered, with final class numbers, each with its origin and its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inlay.data.examples import MASKED, Example
from inlay.data.formats import ANSWERING, REGRESSION, SEQUENCE, TOKEN
from inlay.data.labels import Labels
from inlay.data.store import ArrowStore, Store
from inlay.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """How much of an epoch comes from each of several sets: `shares` sum to 1, `member[i]` is the set of example i."""

    shares: tuple[float, ...]
    member: NDArray[np.int64]


class Encoded(Sequence[dict[str, Any]]):
    """Encoded examples. `encoded[i]` is what the model takes: `input_ids`, `labels`, `token_type_ids`.

    Attributes:
        task: what they are for.
        labels: what class numbers mean.
        max_length: most tokens of an example.
        packing: whether batches are to pack several examples into one sequence.
        mixture: shares of the sets it was mixed from, where they have weights.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        task: str,
        labels: Labels,
        max_length: int,
        *,
        store_of: NDArray[np.int64] | None = None,
        index_of: NDArray[np.int64] | None = None,
        packing: bool = False,
        mixture: Mixture | None = None,
    ) -> None:
        self.task, self.labels, self.max_length, self.packing, self.mixture = task, labels, max_length, packing, mixture
        self.stores = list(stores)
        sizes = [len(store) for store in self.stores]
        self._store = np.repeat(np.arange(len(sizes)), sizes) if store_of is None else store_of
        self._index = (
            np.concatenate([np.arange(n) for n in sizes] or [np.zeros(0, int)]) if index_of is None else index_of
        )
        lengths = [store.lengths for store in self.stores]
        self.lengths: NDArray[np.int32] = np.zeros(len(self._store), np.int32)
        for number, values in enumerate(lengths):
            mine = self._store == number
            self.lengths[mine] = values[self._index[mine]]
        self._numbers: dict[str, float] = {}
        if labels.names is not None:
            self._numbers = {name: number for number, name in enumerate(labels.names)}

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        example = self.example(i)
        row: dict[str, Any] = {"input_ids": example.input_ids}
        if example.token_type_ids is not None:
            row["token_type_ids"] = example.token_type_ids
        if example.labels is not None:
            row |= self._targets(self.stores[int(self._store[i])], example.labels, i)
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def _targets(self, store: Store, labels: list[int], i: int) -> dict[str, Any]:
        if self.task == ANSWERING:
            return {"start_positions": labels[0], "end_positions": labels[1]}
        if self.task == REGRESSION:
            return {"labels": float(store.names[labels[0]])}
        if self.task == TOKEN and self.labels.names is not None:
            return {"labels": [MASKED if label == MASKED else self._number(store, label, i) for label in labels]}
        if self.task == SEQUENCE and self.labels.several:
            present = {self._number(store, label, i) for label in labels}
            return {"labels": [float(number in present) for number in range(len(self.labels.names or []))]}
        if self.task == SEQUENCE:
            return {"labels": self._number(store, labels[0], i)}
        return {"labels": labels}

    def _number(self, store: Store, label: int, i: int) -> int:
        name = store.names[label]
        if name not in self._numbers:
            raise DataError(f"{self.origin(i)}: the label {name!r} is not among those of the training data")
        return int(self._numbers[name])

    @property
    def labelled(self) -> bool:
        """Whether every example says what is right. Words to tag have labels without it: 0 where a word begins."""
        examples = (self.example(i) for i in range(len(self)))
        return all(each.labels is not None and (self.task != TOKEN or each.references) for each in examples)

    def example(self, i: int) -> Example:
        """Example `i` as it is stored, with the class numbers of its own source."""
        return self.stores[int(self._store[i])].example(int(self._index[i]))

    def origin(self, i: int) -> str:
        """Where example `i` stands, such as `train.csv:17`."""
        return self.stores[int(self._store[i])].origin(int(self._index[i]))

    def reference(self, i: int) -> list[str]:
        """What should come out of example `i` as text: the answers, the class, or the tags of the words that fit."""
        return self.example(i).references

    def prompt_ids(self, i: int) -> list[int]:
        """The tokens that the model is given to write the answer of example `i`."""
        example = self.example(i)
        return example.prompt_ids or example.input_ids

    def prompts(self) -> list[tuple[int, list[str]]]:
        """Each distinct prompt once: the first example that has it, and the references of all that do."""
        found: dict[tuple[int, ...], tuple[int, list[str]]] = {}
        for i in range(len(self)):
            example = self.example(i)
            _, references = found.setdefault(tuple(example.prompt_ids or example.input_ids), (i, []))
            references += [text for text in example.references if text not in references]
        return list(found.values())

    def class_counts(self) -> dict[str, int]:
        """How many examples each class has; empty where examples have no class or several."""
        if self.task != SEQUENCE or self.labels.names is None or self.labels.several:
            return {}
        counts = dict.fromkeys(self.labels.names, 0)
        for number, store in enumerate(self.stores):
            if isinstance(store, ArrowStore):
                found = store.first_labels()[self._index[self._store == number]]
                for label, count in zip(*np.unique(found, return_counts=True), strict=True):
                    if 0 <= label < len(store.names) and store.names[label] in counts:
                        counts[store.names[label]] += int(count)
        return counts

    def select(self, chosen: NDArray[np.int64]) -> Encoded:
        """The examples with these numbers, in this order."""
        mixture = replace(self.mixture, member=self.mixture.member[chosen]) if self.mixture else None
        return Encoded(
            self.stores,
            self.task,
            self.labels,
            self.max_length,
            store_of=self._store[chosen],
            index_of=self._index[chosen],
            packing=self.packing,
            mixture=mixture,
        )

    def groups(self) -> NDArray[np.int64]:
        """A number per example that is equal for examples of the same row."""
        rows = np.zeros(len(self), np.int64)
        offset = 0
        for number, store in enumerate(self.stores):
            mine = self._store == number
            of_store = store.rows() if isinstance(store, ArrowStore) else np.arange(len(store))
            rows[mine] = of_store[self._index[mine]] + offset
            offset += int(of_store.max(initial=-1)) + 1
        return rows

    def strata(self) -> NDArray[np.int64]:
        """A number per example that is equal where source and class are."""
        stratum = self._store.astype(np.int64) * (1 << 32)
        if self.task == SEQUENCE and not self.labels.several:
            for number, store in enumerate(self.stores):
                if isinstance(store, ArrowStore) and store.names:
                    mine = self._store == number
                    stratum[mine] += store.first_labels()[self._index[mine]]
        return stratum

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The examples of one epoch in random order, by (seed, epoch) alone.

        With a mixture, each set has its share of the epoch: a set with more rows than that shows different ones in each
        epoch, in turn; one with fewer shows them several times.
        """
        if self.mixture is None:
            return np.random.default_rng([seed, epoch]).permutation(len(self))
        chosen = []
        for number, share in enumerate(self.mixture.shares):
            members = np.flatnonzero(self.mixture.member == number)
            count = round(share * len(self))
            if len(members) and count:
                chosen.append(members[_in_turn(len(members), epoch * count, count, [seed, number])])
        mixed = np.concatenate(chosen)
        return mixed[np.random.default_rng([seed, epoch]).permutation(len(mixed))]


def _in_turn(size: int, start: int, count: int, seed: list[int]) -> NDArray[np.int64]:
    """Elements `start` to `start + count` of an endless row of random passes over `size` things."""
    first, last = start // size, (start + count - 1) // size
    passes = [np.random.default_rng([*seed, 1 + k]).permutation(size) for k in range(first, last + 1)]
    return np.concatenate(passes)[start - first * size :][:count]
