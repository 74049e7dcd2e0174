"""Files as rows that know where they come from: what a reader is, JSON and CSV.

A reader makes one pass over its file to learn where the rows begin, and from then on reads any row by number, so a
file may be larger than memory. Reading is strict: a row that cannot be read is a `RowError` at its line, never a guess.
"""

from __future__ import annotations

import csv
import hashlib
import json
import mmap
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from inlay.data.rows import RowError
from inlay.errors import DataError

FIRST, LAST = "__first__", "__last__"
"""Keys of a row of running text: whether its document begins and ends in this row."""

csv.field_size_limit(max(csv.field_size_limit(), 1 << 27))


class Reader(ABC):
    """Rows by number. `row(i)` raises `RowError`; `line(i)` and `file(i)` say where it stands."""

    name: str
    notes: list[str]
    """What was decided while opening, in words."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, i: int) -> dict[str, Any]:
        """Row `i` as column -> value."""

    @abstractmethod
    def line(self, i: int) -> int:
        """The line of the file where row `i` begins, from 1; the row's number where there are no lines."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content."""

    def file(self, i: int) -> str:
        """The name of the file that row `i` stands in."""
        return self.name

    def raw(self, i: int) -> object:
        """Row `i` as it stands in the file, for reports."""
        return None


class Mapped(Reader):
    """A file of text in UTF-8 whose rows are ranges of bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.notes = path, path.name, []
        self._start, self._end, self._line = array("q"), array("q"), array("q")
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
                self._bytes: bytes | mmap.mmap = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        if self._bytes[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16; expected UTF-8. Convert it: iconv -f utf-16 -t utf-8")
        self._bom = 3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0

    def __len__(self) -> int:
        return len(self._start)

    def line(self, i: int) -> int:
        return self._line[i]

    def raw(self, i: int) -> object:
        return self._bytes[self._start[i] : self._end[i]].decode("utf-8", "backslashreplace")

    def fingerprint(self) -> str:
        return hashlib.sha256(self._bytes).hexdigest()

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each row."""
        return np.asarray(self._end, np.int64) - np.asarray(self._start, np.int64)

    def _text(self, i: int) -> str:
        return decode(self._bytes[self._start[i] : self._end[i]], self._line[i])

    def _add(self, start: int, end: int, line: int) -> None:
        self._start.append(start)
        self._end.append(end)
        self._line.append(line)

    def _lines(self, position: int, number: int = 1) -> Iterator[tuple[int, int, int]]:
        """`(number, start, end)` of each line from `position` on; `end` is behind its newline."""
        data = self._bytes
        while position < len(data):
            end = data.find(b"\n", position) + 1 or len(data)
            yield number, position, end
            position, number = end, number + 1

    def _index_lines(self) -> None:
        for number, start, end in self._lines(self._bom):
            if end - start > 2 or self._bytes[start:end].strip():  # an empty line holds no row
                self._add(start, end, number)


class JsonLines(Mapped):
    """One JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index_lines()

    def row(self, i: int) -> dict[str, Any]:
        return _as_object(_parse_json(self._text(i).strip()))


class JsonArray(Mapped):
    """A JSON array of objects, or an object with one such array in it. The whole file is parsed at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        text = decode(self._bytes[self._bom :], None, path)
        decoder = json.JSONDecoder(parse_constant=_refuse_constant)
        start = _skip_space(text, 0)
        if text[start : start + 1] == "{":
            start = self._enter_object(text, decoder, start)
        if text[start : start + 1] != "[":
            raise DataError(f"{path} is not a JSON array of rows; expected [{{...}}, ...] or one row per line (.jsonl)")
        self._rows: list[Any] = []
        position, counted, line = _skip_space(text, start + 1), 0, 1
        while text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            counted = position
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", str(error))
                line = getattr(error, "lineno", line)
                raise DataError(f"{path}:{line}: {reason}; expected JSON. Correct the file there.") from None
            self._rows.append(value)
            self._add(0, 0, line)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                line += text.count("\n", counted, position)
                raise DataError(
                    f"{path}:{line}: expected ',' or ']' after row {len(self._rows)}. Correct the file there."
                )

    def _enter_object(self, text: str, decoder: json.JSONDecoder, start: int) -> int:
        try:
            key, position = decoder.raw_decode(text, _skip_space(text, start + 1))
        except ValueError:
            return start
        position = _skip_space(text, position)
        opened = _skip_space(text, position + 1)
        if not isinstance(key, str) or text[position : position + 1] != ":" or text[opened : opened + 1] != "[":
            return start
        self.notes.append(f"rows are the list under {key!r}")
        return opened

    def row(self, i: int) -> dict[str, Any]:
        return _as_object(self._rows[i])

    def raw(self, i: int) -> object:
        return self._rows[i]


class Delimited(Mapped):
    """CSV or TSV with a header line, read by the csv module in strict mode.

    A record that spans lines and turns out to be broken spoils its first line alone: reading goes on in the next line,
    so that one stray quote cannot swallow the rows after it.
    """

    def __init__(self, path: Path, delimiter: str | None = None) -> None:
        super().__init__(path)
        head = next(self._lines(self._bom), (1, 0, 0))
        header_line = decode(self._bytes[head[1] : head[2]], 1, path).rstrip("\r\n")
        if delimiter is None:
            delimiter = next((d for d in ",;\t|" if d in header_line), ",")
            if delimiter != ",":
                self.notes.append(f"fields are separated by {delimiter!r}")
        self._quoting = csv.QUOTE_MINIMAL
        self._delimiter = delimiter
        self._faults: dict[int, str] = {}
        self._index()
        if delimiter == "\t" and self._faults and b'"' in self._bytes[head[1] :]:
            self._quoting = csv.QUOTE_NONE
            self.notes.append("quotes are ordinary characters, because as quotes they do not match")
            self._index()
        lines, first = self._longest
        if lines > 1:
            self.notes.append(f"quoted fields span lines; the longest row is lines {first} to {first + lines - 1}")

    def _index(self) -> None:
        self._start, self._end, self._line = array("q"), array("q"), array("q")
        self._faults.clear()
        self._longest = (0, 0)
        self.columns: list[str] = []
        resume: tuple[int, int] | None = (self._bom, 1)
        while resume is not None:
            resume = self._index_from(*resume)
        if not self.columns and self._faults:
            raise DataError(
                f"{self.path}:{self._line[0]}: {self._faults[0]}; expected a header line with the columns' names"
            )
        if not self.columns:
            raise DataError(f"{self.path} is empty; expected a header line with the names of the columns")
        if repeated := {c for c in self.columns if self.columns.count(c) > 1}:
            raise DataError(f"{self.path}:1: the header names {sorted(repeated)[0]!r} twice; expected distinct columns")

    def _index_from(self, position: int, number: int) -> tuple[int, int] | None:
        """Index from byte `position`, which is line `number`; where to go on after giving up a record, else None."""
        fed, end, first_end = 0, position, position

        def feed() -> Iterator[str]:
            nonlocal fed, end, first_end
            for _, start, stop in self._lines(position):
                fed, end = fed + 1, stop
                first_end = stop if fed == taken + 1 else first_end
                yield self._bytes[start:stop].decode("utf-8", "surrogateescape")

        taken = 0
        records = csv.reader(feed(), **self._dialect())
        while True:
            begin, fault = end, ""
            try:
                fields = next(records, None)
            except csv.Error as error:
                fields, fault = [], "a quote that is never closed" if "end of data" in str(error) else str(error)
            if fields is None:
                return None
            line, spanned, taken = number + taken, fed - taken, fed
            if not fields and not fault:
                continue
            if not self.columns and not fault:
                self.columns = [name.strip() for name in fields]
                continue
            if not fault and len(fields) != len(self.columns):
                fault = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            if not fault:
                self._add(begin, end, line)
                self._longest = max(self._longest, (spanned, line))
                continue
            self._faults[len(self)] = fault
            self._add(begin, first_end, line)
            if spanned > 1:
                return first_end, line + 1

    def _dialect(self) -> dict[str, Any]:
        return {"delimiter": self._delimiter, "strict": True, "quoting": self._quoting}

    def row(self, i: int) -> dict[str, Any]:
        text = self._text(i)
        if fault := self._faults.get(i):
            names = ", ".join(self.columns)
            raise RowError(f"{len(self.columns)} fields ({names}), found: {fault}", value=text.rstrip("\r\n"))
        fields = next(csv.reader([text], **self._dialect()))
        return dict(zip(self.columns, fields, strict=True))


class InMemory(Reader):
    """Rows that the caller holds."""

    def __init__(self, rows: Sequence[Any], name: str = "rows") -> None:
        self.name, self.notes, self._rows = name, [], rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> dict[str, Any]:
        return _as_object(self._rows[i])

    def line(self, i: int) -> int:
        return i + 1

    def raw(self, i: int) -> object:
        return self._rows[i]

    def fingerprint(self) -> str:
        text = json.dumps(list(self._rows), default=repr, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def decode(raw: bytes, line: int | None, path: Path | None = None) -> str:
    """`raw` as text; a `RowError`, or with `path` a `DataError`, that names the first byte which is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        at = (line or 1) + before.count(b"\n")
        place = error.start - (before.rfind(b"\n") + 1) + 1
        byte = f"byte {place} of the line is {raw[error.start]:#04x}"
        expected = f"UTF-8; {byte} (from Latin-1: iconv -f latin1 -t utf-8)"
        shown = raw[max(0, error.start - 15) : error.start + 15]
        if path is not None:
            raise DataError(f"{path}:{at}: {shown!r}; expected {expected}") from None
        raise RowError(expected, value=shown, line=at) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise RowError("JSON that is not nested so deep", value=text) from None
    except ValueError as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RowError(f"a JSON object ({reason})", value=text) from None


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("a JSON object with a column per key", value=value)
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def names_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The columns of some rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
