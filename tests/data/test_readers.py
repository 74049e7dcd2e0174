"""Reading is strict and complete: each row comes back as it was written, or as an error at its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.data.readers import Delimited, InMemory, JsonArray, JsonLines, Reader
from inlay.data.rows import RowError
from inlay.errors import DataError

Write = Callable[[str, Any], Path]


def outcomes(reader: Reader) -> list[tuple[int, Any]]:
    """(line, row) of each row, the error where it has one."""
    found: list[tuple[int, Any]] = []
    for i in range(len(reader)):
        try:
            found.append((reader.line(i), reader.row(i)))
        except RowError as error:
            found.append((error.line or reader.line(i), error))
    return found


def test_csv_rows_come_with_their_lines(write: Write) -> None:
    path = write("a.csv", '\ufefftext,label\r\nhi,1\r\n\r\n"two\nlines, ""quoted""",0\r\n5" pipe,1')
    assert outcomes(Delimited(path)) == [
        (2, {"text": "hi", "label": "1"}),
        (4, {"text": 'two\nlines, "quoted"', "label": "0"}),
        (6, {"text": '5" pipe', "label": "1"}),
    ]


def test_a_stray_quote_spoils_its_own_line_only(write: Write) -> None:
    path = write("a.csv", 'text,label\na,0\n"open,1\nb,0\n"c",1\nd,0\n"never closed,1\ne,1\n')
    found = outcomes(Delimited(path))
    assert [(line, row["text"]) for line, row in found if isinstance(row, dict)] == [
        (2, "a"),
        (4, "b"),
        (5, "c"),
        (6, "d"),
        (8, "e"),
    ]
    assert [line for line, row in found if isinstance(row, RowError)] == [3, 7]
    assert str(found[-2][1]).endswith("found: a quote that is never closed")


def test_wrong_number_of_fields(write: Write) -> None:
    (few, many) = (row for _, row in outcomes(Delimited(write("a.csv", "text,label\na\nb,1,2\n"))))
    assert str(few) == "'a'; expected 2 fields (text, label), found: 1 field"
    assert str(many) == "'b,1,2'; expected 2 fields (text, label), found: 3 fields"


def test_bytes_that_are_not_utf8_name_line_and_byte(write: Write) -> None:
    reader = Delimited(write("a.csv", b"text,label\nok,1\nna\xefve,0\nfine,1\n"))
    (_, good), (line, bad), (_, after) = outcomes(reader)
    assert good["text"] == "ok"
    assert after["text"] == "fine"
    assert line == 3
    assert "byte 3 of the line is 0xef" in str(bad)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "is empty; expected a header"),
        ("a.csv", "x,x\n1,2\n", "names 'x' twice"),
        ("a.csv", "x,y\r1,2\r", "a.csv:1: new-line character seen.*expected a header"),
        ("a.csv", "text\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"te\xffxt,label\na,b\n", "expected UTF-8"),
    ],
)
def test_files_that_cannot_be_read_at_all(write: Write, name: str, content: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Delimited(write(name, content))


def test_separator_and_quotes_of_tables_are_found(write: Write) -> None:
    semicolon = Delimited(write("a.csv", "text;label\na;1\n"))
    assert semicolon.row(0) == {"text": "a", "label": "1"}
    assert semicolon.notes == ["fields are separated by ';'"]
    quoted = Delimited(write("a.tsv", 'text\tlabel\n"a\tb"\t1\n'), "\t")
    assert quoted.row(0) == {"text": "a\tb", "label": "1"}
    literal = Delimited(write("b.tsv", 'text\tlabel\n"so" he said\t1\n"open\t0\n'), "\t")
    assert [literal.row(i)["text"] for i in range(2)] == ['"so" he said', '"open']
    assert any("ordinary characters" in note for note in literal.notes)


field = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=12)


@given(st.lists(st.tuples(field, field), max_size=8))
def test_what_the_csv_module_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(text.getvalue().encode())
    assert [tuple(row.values()) for _, row in outcomes(Delimited(path))] == rows


good_line = st.sampled_from(["ok,1", "fine,0", '"with, comma",1'])
bad_line = st.sampled_from(["one", "a,b,c", '"open,1', 'x"y"z', '"a"b,1', ",,"])


@given(st.lists(st.one_of(good_line, bad_line), max_size=12))
def test_every_good_line_survives_any_bad_ones(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("text,label\n" + "".join(f"{line}\n" for line in lines))
    found = dict(outcomes(Delimited(path)))
    for number, line in enumerate(lines, 2):
        if line in ("ok,1", "fine,0", '"with, comma",1'):
            assert found[number] == dict(zip(("text", "label"), next(csv.reader([line])), strict=True))
        else:
            assert isinstance(found[number], RowError)
    assert len(found) == len(lines)


@given(st.lists(st.one_of(st.binary(max_size=20), st.just(b'{"text": "a"}')), max_size=8))
def test_json_lines_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    lines = [line.replace(b"\n", b"") for line in lines]
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return
    reader = JsonLines(path)
    found = outcomes(reader)
    good = [number for number, line in enumerate(lines, 1) if line == b'{"text": "a"}']
    assert [line for line, row in found if row == {"text": "a"}] == good
    start = 3 if path.read_bytes()[:3] == b"\xef\xbb\xbf" else 0
    bare = path.read_bytes()[start:].split(b"\n")
    assert len(found) == sum(bool(line.strip()) or len(line) > 1 for line in bare)


def test_json_lines_say_what_is_wrong(write: Write) -> None:
    lines = ['{"a": 1}', '{"a": }', "[1]", '{"a": NaN}', "[" * 100_000, '{"a": 2}']
    found = outcomes(JsonLines(write("a.jsonl", "\n".join(lines))))
    assert [row for _, row in found if isinstance(row, dict)] == [{"a": 1}, {"a": 2}]
    messages = [str(row) for _, row in found if isinstance(row, RowError)]
    assert "Expecting value at character 7" in messages[0]
    assert "expected a JSON object" in messages[1]
    assert "NaN is no JSON value" in messages[2]
    assert "not nested so deep" in messages[3]


def test_json_arrays_know_their_lines(write: Write) -> None:
    path = write("a.json", '{"data": [\n  {"a": 1},\n  {"a":\n   2},\n 3]}')
    reader = JsonArray(path)
    assert [line for line, _ in outcomes(reader)] == [2, 3, 5]
    assert reader.row(1) == {"a": 2}
    assert reader.notes == ["rows are the list under 'data'"]
    with pytest.raises(RowError, match="3; expected a JSON object"):
        reader.row(2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a": 1},\n{"a": }]', "a.json:2: Expecting value"),
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']'"),
        ("7", "not a JSON array"),
    ],
)
def test_broken_json_arrays(write: Write, content: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        JsonArray(write("a.json", content))


def test_fingerprints_follow_the_content(write: Write) -> None:
    one, two = JsonLines(write("a.jsonl", '{"a": 1}\n')), JsonLines(write("b.jsonl", '{"a": 1}\n'))
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != JsonLines(write("c.jsonl", '{"a": 2}\n')).fingerprint()
    assert InMemory([{"a": 1}]).fingerprint() != InMemory([{"a": 2}]).fingerprint()


def test_a_row_keeps_its_raw_form(write: Write) -> None:
    reader = JsonLines(write("a.jsonl", json.dumps({"a": "é"}, ensure_ascii=False) + "\n"))
    assert reader.raw(0) == '{"a": "é"}\n'
