"""Parquet, Arrow and hub data, read through the `datasets` library, which maps them from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.data.readers import Reader
from inlay.data.rows import RowError
from inlay.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class Table(Reader):
    """A `datasets.Dataset`. Class numbers are read as their names; the class -1 (unlabelled) as a missing value."""

    def __init__(self, dataset: Dataset, name: str, fingerprint: str) -> None:
        self.name, self.notes, self._fingerprint = name, [], fingerprint
        self.columns: list[str] = list(dataset.column_names)
        self._dataset = dataset
        self._names: dict[str, list[str]] = {}
        for column, feature in dataset.features.items():
            names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
            if names is not None:
                self._names[column] = list(names)

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, i: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self._dataset[i]
        except Exception as error:  # a damaged page shows in whatever exception its decoder raises
            raise RowError(f"a readable row ({error})") from error
        for column, names in self._names.items():
            value = row[column]
            if isinstance(value, list):
                row[column] = [_class_name(names, each) for each in value]
            else:
                row[column] = _class_name(names, value)
        return row

    def line(self, i: int) -> int:
        return i + 1

    def raw(self, i: int) -> object:
        return self._dataset[i]

    def fingerprint(self) -> str:
        return self._fingerprint


def _class_name(names: list[str], number: int | None) -> str | None:
    return names[number] if number is not None and 0 <= number < len(names) else None


def open_parquet(path: Path, cache_dir: Path) -> Table:
    """One Parquet file."""
    from datasets import Dataset

    return _open(path, lambda: Dataset.from_parquet(str(path), cache_dir=str(cache_dir / "parquet")))


def open_arrow(path: Path) -> Table:
    """One Arrow file, in the file or the stream form."""
    import pyarrow as pa
    from datasets import Dataset

    def load() -> Dataset:
        with path.open("rb") as file:
            if file.read(6) == b"ARROW1":
                return Dataset(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
        return Dataset.from_file(str(path))

    return _open(path, load)


def open_saved(path: Path) -> dict[str, Table]:
    """A folder written by `save_to_disk`, as split -> rows; a single data set is the split "train"."""
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} looks like a saved data set but does not load: {error}") from error
    splits = {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in (".arrow", ".json"))
    content = hashlib.sha256(b"".join(_file_hash(file) for file in files)).hexdigest()
    return {split: Table(data, f"{path.name}/{split}", f"{content}/{split}") for split, data in splits.items()}


def open_hub(name: str, subset: str | None, revision: str | None) -> dict[str, Table]:
    """A data set of the Hugging Face hub, as split -> rows. Downloaded in full once; no code of the hub is run."""
    from datasets import DatasetDict, load_dataset

    with _quiet():
        try:
            loaded = load_dataset(name, subset, revision=revision)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{name!r} is no file here and does not load from the Hugging Face hub: {reason}\n"
                "Check the spelling of the path, or the name (org/name:subset) and the network."
            ) from error
    if not isinstance(loaded, DatasetDict):
        raise DataError(f"{name!r} loaded as {type(loaded).__name__}; expected a data set with splits")
    tables = {}
    for split, data in loaded.items():
        files = [(file["filename"], Path(file["filename"]).stat().st_size) for file in data.cache_files]
        content = hashlib.sha256(repr((name, subset, revision, str(split), len(data), files)).encode()).hexdigest()
        tables[str(split)] = Table(data, f"{name}/{split}", content)
    return tables


def _open(path: Path, load: Callable[[], Dataset]) -> Table:
    with _quiet():
        try:
            dataset = load()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{path} cannot be read as {path.suffix.lstrip('.')}: {reason}") from error
    return Table(dataset, path.name, _file_hash(path).hex())


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars and its log of errors that we report ourselves."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
