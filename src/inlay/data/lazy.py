"""Examples that are tokenized when they are asked for, for sets too large to be tokenized ahead.

All rows are read once, to find the bad ones, the classes, and how long rows are. After that any example is reached at
once, so the order of an epoch is as random and as easily resumed as with a store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from inlay.data.examples import Encoder, Example
from inlay.data.readers import Mapped, Reader
from inlay.data.rows import BadRows, Record, RowError
from inlay.data.store import Counts
from inlay.errors import DataError


class LazyStore:
    """A `Store` that keeps nothing but the numbers of the good rows.

    A row that turns out to hold nothing to learn once it is tokenized is an error; with `on_bad_row=skip` it is written
    aside, and the next row takes its place. `lengths` are estimates from the bytes of a row, good for sorting.
    """

    def __init__(
        self, reader: Reader, rows: NDArray[np.int64], parse: Callable[[int], Record], encoder: Encoder, bad: BadRows
    ) -> None:
        self._reader, self._rows, self._parse, self._encoder, self._bad = reader, rows, parse, encoder, bad
        self.names = list(encoder.names)
        self.counts = Counts(rows=len(reader), examples=len(rows), skipped=bad.count)
        self.lengths: NDArray[np.int32] = self._estimate()
        self._failed: set[int] = set()
        self._cut: set[int] = set()

    def _estimate(self) -> NDArray[np.int32]:
        if not isinstance(self._reader, Mapped) or not len(self._rows):
            return np.ones(len(self._rows), np.int32)
        sizes = self._reader.sizes()[self._rows]
        probe = self._rows[:: max(1, len(self._rows) // 64)][:64]
        lengths = [len(found[0].input_ids) for i in probe if isinstance(found := self._encode(int(i)), list)]
        ratio = float(self._reader.sizes()[probe].sum()) / max(1, sum(lengths))
        return np.maximum(1, sizes / max(ratio, 1e-9)).astype(np.int32)

    def _encode(self, row: int) -> Sequence[Example] | RowError:
        try:
            return self._encoder([self._parse(row)])[0]
        except RowError as error:
            return error

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, i: int) -> Example:
        for step in range(len(self._rows)):
            at = (i + step) % len(self._rows)
            row = int(self._rows[at])
            found = self._encode(row)
            if not isinstance(found, RowError):
                example = found[0]
                if example.cut and row not in self._cut:
                    self._cut.add(row)
                    self.counts.cut += 1
                    self.counts.cut_tokens += example.cut
                return example
            if at not in self._failed:
                self._failed.add(at)
                self._bad.add(self._reader.file(row), self._reader.line(row), found, self._reader.raw(row))
                self._bad.raise_if_any()
                self.counts.skipped += 1
        raise DataError(
            f"{self._reader.name} has no row that can be learned from; the bad rows are in {self._bad.file}"
        )

    def row(self, i: int) -> int:
        return int(self._rows[i])

    def origin(self, i: int) -> str:
        row = int(self._rows[i])
        return f"{self._reader.file(row)}:{self._reader.line(row)}"
