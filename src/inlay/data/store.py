"""Encoded examples on disk: an Arrow file that is mapped, never loaded, and a manifest that proves it is whole.

A store is a folder that appears at once: written aside, flushed, renamed. Its name is a hash of everything that decides
its content: the rows, how they were read, the tokenizer, the template, the length, and the code that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from inlay.data.examples import Example
from inlay.errors import DataError
from inlay.folders import sha256, sync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_BATCH = 1000
_MODULES = (
    *("chat", "encode_labels", "encode_template", "encode_text", "encoding", "examples", "formats", "parse"),
    *("readers", "rows", "sources", "store", "tables", "text_readers", "../template"),
)
"""The code that decides what a store holds."""


@dataclass
class Counts:
    """What became of the rows of one source."""

    rows: int = 0
    examples: int = 0
    skipped: int = 0
    cut: int = 0
    """examples that lost their end to max_length"""
    cut_tokens: int = 0
    cut_first: list[str] = field(default_factory=list)
    """where the first of them stand"""
    notes: dict[str, int] = field(default_factory=dict)
    lossy: int = 0
    """rows with characters that the tokenizer does not know"""
    lossy_first: list[str] = field(default_factory=list)
    lost: str = ""
    """the characters that are lost"""
    several: bool = False
    """rows have lists of classes"""


@dataclass(frozen=True)
class Placed:
    """An example and the row it was made from."""

    example: Example
    row: int
    file: int
    line: int


class Store(Protocol):
    """Examples of one source by number, however they are kept."""

    names: list[str]
    counts: Counts
    lengths: NDArray[np.int32]

    def __len__(self) -> int: ...

    def example(self, i: int) -> Example: ...

    def row(self, i: int) -> int: ...

    def origin(self, i: int) -> str: ...


class ArrowStore:
    """Examples in Arrow record batches, mapped from a file or in memory."""

    def __init__(self, batches: Sequence[Any], names: list[str], files: list[str], counts: Counts) -> None:
        self.names, self.files, self.counts = names, files, counts
        self._batches = list(batches)
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        sizes = [self._lengths(batch, "input_ids") for batch in self._batches]
        targets = [self._lengths(batch, "labels") for batch in self._batches]
        both = [np.maximum(s, t) for s, t in zip(sizes, targets, strict=True)]
        self.lengths: NDArray[np.int32] = np.concatenate(both).astype(np.int32) if both else np.zeros(0, np.int32)

    @staticmethod
    def _lengths(batch: Any, column: str) -> NDArray[np.int64]:
        offsets = batch.column(column).offsets.to_numpy()
        return np.asarray(np.diff(offsets), np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, i: int) -> tuple[Any, int]:
        at = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._batches[at], i - int(self._starts[at])

    def example(self, i: int) -> Example:
        batch, at = self._find(i)

        def ints(column: str) -> list[int] | None:
            array = batch.column(column)
            if not array[at].is_valid:
                return None
            begin, end = array.offsets[at].as_py(), array.offsets[at + 1].as_py()
            values: list[int] = array.values[begin:end].to_numpy().tolist()
            return values

        references: list[str] = batch.column("references")[at].as_py()
        return Example(
            ints("input_ids") or [], ints("labels"), ints("token_type_ids"), ints("prompt_ids") or [], references
        )

    def row(self, i: int) -> int:
        batch, at = self._find(i)
        return int(batch.column("row")[at].as_py())

    def rows(self) -> NDArray[np.int64]:
        """The row of the source that each example was made from."""
        columns = [batch.column("row").to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.zeros(0, np.int64)

    def first_labels(self) -> NDArray[np.int64]:
        """The first label of each example, -1 where it has none."""
        found = [np.zeros(0, np.int64)]
        for batch in self._batches:
            column = batch.column("labels")
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            filled = np.diff(offsets) > 0
            labels = np.full(batch.num_rows, -1, np.int64)
            labels[filled] = values[offsets[:-1][filled]]
            found.append(labels)
        return np.concatenate(found)

    def origin(self, i: int) -> str:
        batch, at = self._find(i)
        return f"{self.files[batch.column('file')[at].as_py()]}:{batch.column('line')[at].as_py()}"


def schema() -> Any:
    """The columns of a store."""
    import pyarrow as pa

    ints = pa.list_(pa.int32())
    return pa.schema(
        [
            ("input_ids", ints),
            ("labels", ints),
            ("token_type_ids", pa.list_(pa.int8())),
            ("prompt_ids", ints),
            ("references", pa.list_(pa.string())),
            ("row", pa.int64()),
            ("file", pa.int32()),
            ("line", pa.int64()),
        ]
    )


def batches_of(placed: Iterable[Placed]) -> Iterator[Any]:
    """Arrow record batches of `ROWS_PER_BATCH` examples."""
    import pyarrow as pa

    columns = schema()
    buffer: list[Placed] = []

    def flush() -> Any:
        rows = [
            {
                "input_ids": each.example.input_ids,
                "labels": each.example.labels,
                "token_type_ids": each.example.token_type_ids,
                "prompt_ids": each.example.prompt_ids,
                "references": each.example.references,
                "row": each.row,
                "file": each.file,
                "line": each.line,
            }
            for each in buffer
        ]
        buffer.clear()
        return pa.RecordBatch.from_pylist(rows, schema=columns)

    for each in placed:
        buffer.append(each)
        if len(buffer) == ROWS_PER_BATCH:
            yield flush()
    if buffer:
        yield flush()


class Making:
    """A store under way: its examples, and what is known of it when the last one has come."""

    def __init__(self, placed: Iterable[Placed], counts: Counts, names: dict[str, int], files: dict[str, int]) -> None:
        self.placed, self.counts, self.names, self.files = placed, counts, names, files


def open_or_make(folder: Path, make: Callable[[Path], Making]) -> tuple[ArrowStore, str]:
    """The store in `folder`, made first where it is not there or not whole.

    Args:
        folder: where it is, or will be; named by `store_key`.
        make: called with a folder aside in which to leave further files, such as the skipped rows.

    Returns:
        The store, and what happened: "" (it was there), "made" or "rebuilt".
    """
    happened = "made"
    if folder.exists():
        try:
            return _open(folder), ""
        except (OSError, ValueError, KeyError, TypeError):
            happened = "rebuilt"
            shutil.rmtree(folder, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write(aside, make(aside))
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.exists():
                raise
        sync(folder.parent)
        return _open(folder), happened
    except OSError as error:
        raise DataError(
            f"the tokenized data cannot be kept in {folder.parent}: {error.strerror or error}. Make room there, or give"
            " another cache folder."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def in_memory(making: Making) -> ArrowStore:
    """A store that is not kept."""
    batches = list(batches_of(making.placed))
    return ArrowStore(batches, list(making.names), list(making.files), making.counts)


def _write(folder: Path, making: Making) -> None:
    import pyarrow as pa

    path = folder / "examples.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema()) as writer:
        for batch in batches_of(making.placed):
            writer.write_batch(batch)
    sync(path)
    manifest = {
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "names": list(making.names),
        "files": list(making.files),
        "counts": asdict(making.counts),
    }
    with (folder / "manifest.json").open("w", encoding="utf-8") as out:
        json.dump(manifest, out, ensure_ascii=True)
        out.flush()
        os.fsync(out.fileno())
    sync(folder)


def _open(folder: Path) -> ArrowStore:
    import pyarrow as pa

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    path = folder / "examples.arrow"
    if path.stat().st_size != manifest["bytes"] or sha256(path) != manifest["sha256"]:
        raise ValueError(f"{path} is not what was written")
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    return ArrowStore(batches, manifest["names"], manifest["files"], Counts(**manifest["counts"]))


def store_key(**parts: object) -> str:
    """A hash of what decides the content of a store, this code included."""
    import tokenizers
    import transformers

    here = Path(__file__).parent
    code = hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in _MODULES)).hexdigest()
    versions = [transformers.__version__, tokenizers.__version__]
    text = json.dumps([code, versions, parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything in a tokenizer that decides which tokens a text becomes, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts: dict[str, Any] = json.loads(backend.to_str())
        parts.pop("truncation", None)  # set by each call
        parts.pop("padding", None)
    else:
        parts = {"vocabulary": sorted(tokenizer.get_vocab().items()), "class": type(tokenizer).__name__}
    parts["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts["template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
