"""Tagged sentences, lines, documents and folders of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.data.readers import FIRST, LAST
from inlay.data.rows import RowError
from inlay.data.text_readers import Documents, Lines, Tagging, Whole

Write = Callable[[str, Any], Path]


def test_conll_sentences(write: Write) -> None:
    content = "-DOCSTART-\tO\n\nJohn\tB-per\nran\tO\n\t\n\nto\tO\nthe sea\tB-loc\n"
    reader = Tagging(write("a.conll", content))
    assert [reader.row(i) for i in range(len(reader))] == [
        {"tokens": ["John", "ran"], "tags": ["B-per", "O"]},
        {"tokens": ["to", "the sea"], "tags": ["O", "B-loc"]},
    ]
    assert [reader.line(i) for i in range(2)] == [3, 7]
    assert reader.notes == ["1 -DOCSTART- lines mark documents and are no sentences"]


def test_conll_with_blanks_takes_first_and_last_field(write: Write) -> None:
    reader = Tagging(write("a.conll", "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"))
    assert reader.row(0) == {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}


@pytest.mark.parametrize("bad", ["walks", "walks\tO\tX", "\tO", "walks\t"])
def test_conll_names_the_broken_line(write: Write, bad: str) -> None:
    reader = Tagging(write("a.conll", f"John\tB-per\n{bad}\n\nok\tO\n"))
    with pytest.raises(RowError, match="2 fields separated by TAB") as raised:
        reader.row(0)
    assert raised.value.line == 2
    assert reader.row(1) == {"tokens": ["ok"], "tags": ["O"]}


def test_lines_carry_the_class_of_their_file(write: Write) -> None:
    reader = Lines(write("pos", "good \r\n\nfine"), "pos")
    assert [reader.row(i) for i in range(len(reader))] == [
        {"text": "good ", "label": "pos"},
        {"text": "fine", "label": "pos"},
    ]
    assert reader.line(1) == 3


def test_documents_end_at_the_border_token(write: Write) -> None:
    reader = Documents(write("a.txt", "\none\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n"))
    assert [reader.row(i)["text"] for i in range(len(reader))] == ["one\ntwo", "three"]
    assert [reader.line(i) for i in range(2)] == [1, 4]
    assert reader.notes[0].startswith("2 documents")


@given(st.text(st.sampled_from("aé€😀 \n"), min_size=1, max_size=80), st.integers(4, 30))
def test_pieces_of_a_document_are_the_document(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int) -> None:
    path = tmp_path_factory.mktemp("docs") / "a.txt"
    path.write_bytes(text.encode())
    reader = Documents(path, piece)
    rows = [reader.row(i) for i in range(len(reader))]
    assert "".join(row["text"] for row in rows).strip() == text.strip()
    if text.strip():
        assert [row[FIRST] for row in rows] == [True] + [False] * (len(rows) - 1)
        assert [row[LAST] for row in rows] == [False] * (len(rows) - 1) + [True]


def test_one_file_per_text(write: Write) -> None:
    files = [(write("pos/1.txt", "good\n"), "pos"), (write("neg/1.txt", b"\xff"), "neg")]
    reader = Whole("reviews", files)
    assert reader.row(0) == {"text": "good", "label": "pos"}
    assert reader.file(0) == "pos/1.txt"
    with pytest.raises(RowError, match="expected UTF-8"):
        reader.row(1)
