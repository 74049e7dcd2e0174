"""Files of text as rows: tagged sentences, one text per line, running text, one file per text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inlay.data.readers import FIRST, LAST, Mapped, Reader, decode
from inlay.data.rows import RowError

DOCUMENT_BORDER = b"<|endoftext|>"
PIECE = 1 << 20
"""Bytes after which a long document is continued in another row, so that no row is larger than memory."""


class Tagging(Mapped):
    """CoNLL: a token and its tag per line (first and last field), an empty line between sentences.

    Fields are separated by TAB, or by spaces where the first line has no TAB. A separator line may hold blanks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._separator: str | None = None
        self._fields = 0
        documents, begin, first, last = 0, -1, 0, 0
        for number, start, end in self._lines(self._bom):
            raw = self._bytes[start:end]
            if raw.startswith(b"-DOCSTART-"):
                documents += 1
            if not raw.strip() or raw.startswith(b"-DOCSTART-"):
                if begin >= 0:
                    self._add(begin, last, first)
                begin = -1
                continue
            if begin < 0:
                begin, first = start, number
                if not self._fields:
                    self._separator = "\t" if b"\t" in raw else None
                    self._fields = len(self._split(decode(raw, number, path)))
            last = end
        if begin >= 0:
            self._add(begin, last, first)
        if documents:
            self.notes.append(f"{documents} -DOCSTART- lines mark documents and are no sentences")

    def _split(self, line: str) -> list[str]:
        return line.rstrip("\r\n").split(self._separator)

    def row(self, i: int) -> dict[str, Any]:
        tokens, tags = [], []
        for offset, line in enumerate(self._text(i).rstrip("\n").split("\n")):
            fields = self._split(line)
            if len(fields) != self._fields or self._fields < 2 or not fields[0].strip() or not fields[-1].strip():
                separator = "TAB" if self._separator else "spaces"
                count = max(self._fields, 2)
                raise RowError(
                    f"{count} fields separated by {separator}, a token first and its tag last",
                    value=line,
                    line=self._line[i] + offset,
                )
            tokens.append(fields[0].strip())
            tags.append(fields[-1].strip())
        return {"tokens": tokens, "tags": tags}


class Lines(Mapped):
    """One text per line, with the class of the whole file where one is given."""

    def __init__(self, path: Path, label: str | None = None) -> None:
        super().__init__(path)
        self._label = label
        self._index_lines()

    def row(self, i: int) -> dict[str, Any]:
        text = {"text": self._text(i).strip("\r\n")}
        return text if self._label is None else {**text, "label": self._label}


class Documents(Mapped):
    """Running text: the file is one document, or several where `<|endoftext|>` stands between them."""

    def __init__(self, path: Path, piece: int = PIECE) -> None:
        super().__init__(path)
        self._final: set[int] = set()
        data, position, line = self._bytes, self._bom, 1
        while position < len(data):
            border = data.find(DOCUMENT_BORDER, position)
            stop = border if border >= 0 else len(data)
            while stop - position > piece:
                cut = data.rfind(b"\n", position, position + piece) + 1 or position + piece
                while cut < stop and data[cut] & 0xC0 == 0x80:  # never inside a character
                    cut += 1
                self._add(position, cut, line)
                line += data[position:cut].count(b"\n")
                position = cut
            if data[position:stop].strip():
                self._final.add(len(self))
                self._add(position, stop, line)
            elif len(self):
                self._final.add(len(self) - 1)
            resumed = stop + len(DOCUMENT_BORDER) if border >= 0 else stop
            line += data[position:resumed].count(b"\n")
            position = resumed
        count = len(self._final)
        self.notes.append(f"{count} {'document' if count == 1 else 'documents'}, cut into windows of max_length tokens")

    def row(self, i: int) -> dict[str, Any]:
        first, last = i == 0 or i - 1 in self._final, i in self._final
        text = self._text(i).replace("\r\n", "\n")
        text = text.lstrip("\n") if first else text
        return {"text": text.rstrip("\n") if last else text, FIRST: first, LAST: last}


class Whole(Reader):
    """Several files, each of them one text with a class (`pos/17.txt`)."""

    def __init__(self, name: str, files: Sequence[tuple[Path, str]]) -> None:
        self.name, self.notes, self._files = name, [], list(files)

    def __len__(self) -> int:
        return len(self._files)

    def row(self, i: int) -> dict[str, Any]:
        path, label = self._files[i]
        return {"text": decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), 1).strip(), "label": label}

    def line(self, i: int) -> int:
        return 1

    def file(self, i: int) -> str:
        path = self._files[i][0]
        return f"{path.parent.name}/{path.name}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, label in self._files:
            digest.update(f"{path.name}\0{label}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()
