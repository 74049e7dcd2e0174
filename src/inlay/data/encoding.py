"""The rows of one reader into examples: detect, parse, tokenize, and keep count of what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unicodedata import category

from inlay.data.encode_labels import LabelledEncoder, SpansEncoder, TaggedEncoder
from inlay.data.encode_template import TemplateEncoder, Wording
from inlay.data.encode_text import CausalEncoder, Seq2SeqEncoder
from inlay.data.examples import Encoder, ids_of
from inlay.data.formats import ANSWERING, REGRESSION, SEQ2SEQ, SEQUENCE, TOKEN, Format, ModelKind, detect
from inlay.data.parse import parse
from inlay.data.readers import Reader, names_of
from inlay.data.rows import BadRows, Chat, Labelled, Prompted, Record, RowError, Spans, Tagged
from inlay.data.store import Counts, Making, Placed
from inlay.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 1024
"""`max_length` where neither the user nor the tokenizer limits it."""
SAMPLE = 100
"""Rows that are looked at to find the format."""
MOST_SHOWN = 5
_CHUNK = 256

Progress = Callable[[str, int, int], None]


def max_length_of(given: int | None, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> int:
    """`given`, checked, or the limit of tokenizer and model where that is not above `DEFAULT_MAX_LENGTH`.

    Raises:
        DataError: `given` is more than the model has positions for, or than the tokenizer says that it takes.
    """
    limit = int(min(tokenizer.model_max_length, positions or 1 << 30, 1 << 30))
    if given is None:
        return min(limit, DEFAULT_MAX_LENGTH)
    if given < 2:
        raise DataError(f"max_length is {given}; expected 2 or more")
    if positions is not None and given > positions:
        raise DataError(f"max_length is {given}, and the model has {positions} positions for a text")
    if given > limit:
        raise DataError(f"max_length is {given}, more than the {limit} tokens that the tokenizer's model takes")
    return given


def sample_of(reader: Reader) -> list[dict[str, Any]]:
    """The first readable rows."""
    rows: list[dict[str, Any]] = []
    for i in range(min(len(reader), 10 * SAMPLE)):
        try:
            rows.append(reader.row(i))
        except RowError:
            continue
        if len(rows) == SAMPLE:
            break
    return rows


def format_of(
    reader: Reader,
    model_kind: ModelKind | None,
    task: str | None,
    columns: Mapping[str, str] | None,
    *,
    targets: bool = True,
) -> Format:
    """The format of a reader's rows; see `detect`."""
    sample = sample_of(reader)
    names = getattr(reader, "columns", None) or names_of(sample)
    if not names:
        if len(reader):  # no row can be read: say why instead of missing columns
            bad = BadRows("error")
            for i in range(min(len(reader), SAMPLE)):
                try:
                    reader.row(i)
                except RowError as error:
                    bad.add(reader.file(i), reader.line(i), error)
            bad.raise_if_any()
        raise DataError(f"{reader.name} holds no rows")
    return detect(names, sample, where=reader.name, model_kind=model_kind, task=task, mapping=columns, targets=targets)


def encoder_for(
    form: Format,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    targets: bool = True,
    one_each: bool = False,
    wording: Wording | None = None,
) -> Encoder:
    """The encoder for a task; `one_each`: every row makes exactly one example, or is an error.

    Raises:
        DataError: a wording for a task without classes, or one that does not fit the rows.
    """
    if wording is not None:
        if form.task != SEQUENCE:
            raise DataError(f"a template with a verbalizer is for {SEQUENCE}; the task is {form.task}")
        return TemplateEncoder(tokenizer, max_length, wording, form.roles)
    if form.task in (SEQUENCE, REGRESSION):
        return LabelledEncoder(tokenizer, max_length)
    if form.task == TOKEN:
        return TaggedEncoder(tokenizer, max_length)
    if form.task == ANSWERING:
        return SpansEncoder(tokenizer, max_length)
    if form.task == SEQ2SEQ:
        return Seq2SeqEncoder(tokenizer, max_length, targets=targets)
    return CausalEncoder(tokenizer, max_length, targets=targets, one_each=one_each)


def records_of(
    reader: Reader, form: Format, bad: BadRows, progress: Progress, what: str, *, targets: bool = True
) -> Iterator[tuple[int, Record]]:
    """The good rows of a reader with their numbers; the others go to `bad`."""
    for i in range(len(reader)):
        try:
            yield i, parse(reader.row(i), form, targets=targets)
        except RowError as error:
            bad.add(reader.file(i), reader.line(i), error, reader.raw(i))
        if i % _CHUNK == 0 or i == len(reader) - 1:
            progress(f"{what} {reader.name}", i + 1, len(reader))


def making_of(
    reader: Reader,
    form: Format,
    encoder: Encoder,
    bad: BadRows,
    progress: Progress,
    *,
    targets: bool = True,
    coverage: Coverage | None = None,
) -> Making:
    """The examples of a reader, tokenized a chunk of rows at a time as they are taken."""
    counts = Counts(rows=len(reader))
    files: dict[str, int] = {}

    def placed() -> Iterator[Placed]:
        chunk: list[tuple[int, Record]] = []
        for numbered in records_of(reader, form, bad, progress, "tokenizing", targets=targets):
            chunk.append(numbered)
            if len(chunk) == _CHUNK:
                yield from encode(chunk)
                chunk = []
        yield from encode(chunk)
        bad.raise_if_any()
        counts.skipped = bad.count
        if coverage is not None:
            coverage.tell(counts)
        counts.several = bool(getattr(encoder, "several", False))

    def encode(chunk: list[tuple[int, Record]]) -> Iterable[Placed]:
        for (i, record), found in zip(chunk, encoder([record for _, record in chunk]) if chunk else [], strict=True):
            file, line = reader.file(i), reader.line(i)
            if coverage is not None:
                coverage.see(record, f"{file}:{line}")
            if isinstance(found, RowError):
                bad.add(file, line, found, reader.raw(i))
                continue
            for example in found:
                counts.examples += 1
                if example.cut:
                    counts.cut += 1
                    counts.cut_tokens += example.cut
                    if len(counts.cut_first) < MOST_SHOWN:
                        counts.cut_first.append(f"{file}:{line}")
                if example.note:
                    counts.notes[example.note] = counts.notes.get(example.note, 0) + 1
                yield Placed(example, i, files.setdefault(file, len(files)), line)

    return Making(placed(), counts, encoder.names, files)


class Coverage:
    """Finds the characters of texts that a tokenizer has no token for; they vanish without a trace otherwise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bare = ids_of(tokenizer, ["a"])[0]
        self._known: set[str] = set()
        self._unknown: dict[str, None] = {}
        self._rows = 0
        self._first: list[str] = []

    def see(self, record: Record, origin: str) -> None:
        """Look at the characters of one record."""
        characters = set().union(*texts_of(record))
        new = sorted(characters - self._known - self._unknown.keys())
        for character, ids in zip(new, ids_of(self._tokenizer, [f"a{character}" for character in new]), strict=True):
            invisible = character.isspace() or category(character)[0] in "CM"
            if not invisible and (ids == self._bare or self._tokenizer.unk_token_id in ids):
                self._unknown[character] = None
            else:
                self._known.add(character)
        if not characters.isdisjoint(self._unknown):
            self._rows += 1
            if len(self._first) < MOST_SHOWN:
                self._first.append(origin)

    def tell(self, counts: Counts) -> None:
        """Write down what was found."""
        counts.lossy, counts.lossy_first, counts.lost = self._rows, self._first, "".join(self._unknown)


def texts_of(record: Record) -> list[str]:
    """The texts in a record that become tokens."""
    match record:
        case Labelled():
            return [record.text, record.pair or ""]
        case Tagged():
            return record.tokens
        case Spans():
            return [record.question, record.context]
        case Prompted():
            return [record.system or "", record.prompt, *record.references[:1]]
        case Chat():
            return [str(message["content"]) for message in record.messages]
    return [record.text]
