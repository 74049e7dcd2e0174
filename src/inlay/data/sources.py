"""From the name after `--data` to rows: a file, a folder, a name on the hub, `demo`; `#500` takes a sample."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from inlay.data import demo, tables
from inlay.data.readers import Delimited, JsonArray, JsonLines, Reader
from inlay.data.text_readers import PIECE, Documents, Lines, Tagging, Whole
from inlay.errors import DataError, nearest

TAGGING_SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".bioes", ".ner")
TEXT_SUFFIXES = (".txt", ".text")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet", ".pq", ".arrow", ".feather")
SUFFIXES = (*TABLE_SUFFIXES, *TAGGING_SUFFIXES, *TEXT_SUFFIXES)
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<subset>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
_ASIDE = re.compile(
    r"(readme|license|licence|source|notice|changelog)(\..*)?|.*\.(md|xml|zip|gz|tar|html|pdf|py)", re.I
)
_EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
_SPLIT_WORD = r"(^|[._-]|(?<=\d)){}(set|ing|elopment)?([._-]|$)"


@dataclass(frozen=True)
class Opened:
    """Rows to train on and, where the source has such a part of its own, rows to evaluate on."""

    train: Reader
    held_out: Reader | None = None


@dataclass(frozen=True)
class Reading:
    """How files whose meaning depends on the task are read.

    Attributes:
        documents: plain text files are running text (language modelling), not one text per line.
        piece: bytes after which a document is continued in another row.
        seed: draws the rows of `#n`.
        cache_dir: where Parquet files are unpacked and the demo task is written.
    """

    documents: bool
    seed: int
    cache_dir: Path
    piece: int = PIECE


class Sample(Reader):
    """A seeded sample of another reader's rows, in their order."""

    def __init__(self, whole: Reader, count: int, seed: int) -> None:
        if count > len(whole) or count < 1:
            raise DataError(f"{whole.name}#{count} asks for {count} rows; the file holds {len(whole)}")
        self.name, self._whole = f"{whole.name}#{count}", whole
        self.notes = [*whole.notes, f"a sample of {count} of {len(whole)} rows, drawn with seed {seed}"]
        self._chosen = sorted(random.Random(seed).sample(range(len(whole)), count))
        self._key = f"#{count}/{seed}"

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, i: int) -> dict[str, Any]:
        return self._whole.row(self._chosen[i])

    def line(self, i: int) -> int:
        return self._whole.line(self._chosen[i])

    def file(self, i: int) -> str:
        return self._whole.file(self._chosen[i])

    def raw(self, i: int) -> object:
        return self._whole.raw(self._chosen[i])

    def fingerprint(self) -> str:
        return self._whole.fingerprint() + self._key


class Several(Reader):
    """The rows of several readers, one after another, as one set (a folder with one file per class)."""

    def __init__(self, name: str, parts: list[Reader]) -> None:
        self.name, self._parts = name, parts
        self.notes = [note for part in parts for note in part.notes]
        self._where = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._where)

    def row(self, i: int) -> dict[str, Any]:
        part, at = self._where[i]
        return part.row(at)

    def line(self, i: int) -> int:
        part, at = self._where[i]
        return part.line(at)

    def file(self, i: int) -> str:
        part, at = self._where[i]
        return part.file(at)

    def raw(self, i: int) -> object:
        part, at = self._where[i]
        return part.raw(at)

    def fingerprint(self) -> str:
        return "/".join(f"{part.name}:{part.fingerprint()}" for part in self._parts)


def open_source(name: str, reading: Reading) -> Opened:
    """Open what `name` stands for.

    Raises:
        DataError: there is no such file, folder or data set, or it is of no known kind.
    """
    base, count = _split_sample(name)
    opened = _open_whole(base, reading)
    if count is None:
        return opened
    return Opened(Sample(opened.train, count, reading.seed), opened.held_out)


def _split_sample(name: str) -> tuple[str, int | None]:
    base, mark, count = name.rpartition("#")
    if not mark or Path(name).exists():
        return name, None
    if not count.isdecimal():
        raise DataError(f"{name!r}: expected a number of rows after '#', such as {base}#500")
    return base, int(count)


def _open_whole(name: str, reading: Reading) -> Opened:
    path = Path(name).expanduser()
    if path.is_dir():
        return open_folder(path, reading)
    if path.exists():
        return Opened(open_file(path, reading))
    if name == "demo":
        train, held_out = demo.files(reading.cache_dir)
        return Opened(JsonLines(train), JsonLines(held_out))
    hub = _HUB_NAME.fullmatch(name)
    if hub is None or path.suffix in SUFFIXES or path.parent.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"the folder {path.parent} does not exist"
        raise DataError(f"there is no file {name!r} ({hint})")
    return _of_splits(name, tables.open_hub(hub["name"], hub["subset"], hub["revision"]))


def _of_splits(name: str, splits: dict[str, tables.Table]) -> Opened:
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{name} has no split 'train'; it has {', '.join(splits)}")
    train = splits.get("train") or next(iter(splits.values()))
    held_out = next((splits[stem] for stem in _EVAL_SPLITS if stem in splits), None)
    train.notes.append("its splits: " + ", ".join(f"{split} ({len(rows)} rows)" for split, rows in splits.items()))
    return Opened(train, held_out if held_out is not train else None)


def open_file(path: Path, reading: Reading) -> Reader:
    """One file, by its suffix; files of unknown or of no fixed kind are looked into."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if suffix == ".json":
        return JsonLines(path) if _is_json_lines(path) else JsonArray(path)
    if suffix in (".parquet", ".pq"):
        return tables.open_parquet(path, reading.cache_dir)
    if suffix in (".arrow", ".feather"):
        return tables.open_arrow(path)
    if suffix in TAGGING_SUFFIXES or (suffix != ".csv" and _looks_tagged(path)):
        return Tagging(path)
    if suffix in (".csv", ".tsv", ".tab"):
        return Delimited(path, None if suffix == ".csv" else "\t")
    if suffix in TEXT_SUFFIXES:
        return Documents(path, reading.piece) if reading.documents else Lines(path)
    raise DataError(f"{path} is of no known kind; known: {' '.join(SUFFIXES)}, or a folder with one file per class")


def open_folder(path: Path, reading: Reading) -> Opened:
    """A folder: saved by `datasets`, or `train.*` with `test.*`, or texts to model, or one file or folder per class."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _of_splits(str(path), dict(tables.open_saved(path)))
    entries = sorted(e for e in path.iterdir() if not e.name.startswith(".") and not _ASIDE.fullmatch(e.name))
    files = [entry for entry in entries if entry.is_file()]
    folders = [entry for entry in entries if entry.is_dir()]
    if train := _of_split(files, "train"):
        held_out = next((file for split in _EVAL_SPLITS if (file := _of_split(files, split))), None)
        opened = Opened(open_file(train, reading), open_file(held_out, reading) if held_out else None)
        opened.train.notes.append(f"from the folder {path.name}: train is {train.name}")
        if opened.held_out is not None and held_out is not None:
            opened.train.notes[-1] += f", evaluation is {held_out.name}"
        return opened
    if not files and len(folders) == 1:
        return open_folder(folders[0], reading)
    if not files and len(folders) > 1:
        texts = [(file, folder.name) for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        reader: Reader = Whole(path.name, texts)
        reader.notes.append(f"the class of a file is its folder: {', '.join(folder.name for folder in folders)}")
        return Opened(reader)
    if reading.documents and files and all(file.suffix.lower() in TEXT_SUFFIXES for file in files):
        reader = Several(path.name, [Documents(file, reading.piece) for file in files])
        reader.notes = [f"{len(files)} text file{'s' * (len(files) > 1)}, cut into windows of max_length tokens"]
        return Opened(reader)
    if len(files) < 2 or any(file.suffix.lower() in TABLE_SUFFIXES + TAGGING_SUFFIXES for file in files):
        listing = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise DataError(
            f"the folder {path} holds {listing}; expected train.* (with validation.* or test.*), one text file per"
            " class, or one folder per class. To read one of the files, give its path."
        )
    classes = class_names([file.name for file in files])
    reader = Several(path.name, [Lines(file, label) for file, label in zip(files, classes, strict=True)])
    reader.notes.append(
        "one text per line, the class is the file: "
        + ", ".join(f"{file.name} is {label!r}" for file, label in zip(files, classes, strict=True))
    )
    return Opened(reader)


def class_names(names: list[str]) -> list[str]:
    """What tells file names apart, without the parts that all of them share.

    >>> class_names(["rt-polarity.neg", "rt-polarity.pos"])
    ['neg', 'pos']
    >>> class_names(["plot.tok.gt9.5000", "quote.tok.gt9.5000"])
    ['plot', 'quote']
    """
    parts = [re.split(r"(?<=[._-])", name) for name in names]
    most = min(len(split) for split in parts) - 1
    head = min(most, _shared(parts))
    tail = min(most - head, _shared([split[::-1] for split in parts]))
    return ["".join(split[head : len(split) - tail]).rstrip("._-") for split in parts]


def _shared(parts: list[list[str]]) -> int:
    """How many first elements all lists have in common."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _of_split(files: list[Path], split: str) -> Path | None:
    pattern = re.compile(_SPLIT_WORD.format(split), re.IGNORECASE)
    matches = [file for file in files if pattern.search(file.name)]
    if len(matches) > 1:
        raise DataError(f"{', '.join(m.name for m in matches)}: which one is {split}? Give the path of the file.")
    return matches[0] if matches else None


def _is_json_lines(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(1 << 24).strip()
        more = bool(file.read(1))
    if not first.startswith(b"{"):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return more or not (len(value) == 1 and isinstance(next(iter(value.values())), list))


def _looks_tagged(path: Path) -> bool:
    """Blank lines between blocks of lines that all have the same two or more fields."""
    try:
        with path.open("rb") as file:
            lines = file.read(1 << 16).decode("utf-8", "replace").split("\n")[:-1]
    except OSError:
        return False
    filled = [line.rstrip("\r") for line in lines if line.strip()]
    if len(filled) < 3 or len(filled) == len("\n".join(lines).strip().split("\n")):
        return False
    split: Callable[[str], list[str]] = (lambda s: s.split("\t")) if "\t" in filled[0] else str.split
    counts = {len(split(line)) for line in filled if not line.startswith("-DOCSTART-")}
    return len(counts) == 1 and counts.pop() >= 2
