"""What a name stands for: files by kind, folders by content, samples, the hub, the demo task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay.data.sources import Reading, class_names, open_source
from inlay.data.text_readers import Documents, Lines, Tagging
from inlay.errors import DataError

Write = Callable[[str, Any], Path]


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    return Reading(documents=False, seed=7, cache_dir=tmp_path / "cache")


def rows(reader: Any) -> list[dict[str, Any]]:
    return [reader.row(i) for i in range(len(reader))]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": 2}\n', [{"x": 1}, {"x": 2}]),
        ("a.json", '[{"x": 1}]', [{"x": 1}]),
        ("a.json", '{"x": 1}\n{"x": 2}\n', [{"x": 1}, {"x": 2}]),
        ("a.json", '{"rows": [{"x": 1}]}', [{"x": 1}]),
        ("a.csv", "x\n1\n", [{"x": "1"}]),
        ("a.tsv", "x\ty\n1\t2\n", [{"x": "1", "y": "2"}]),
        (
            "a.tsv",
            "a\tO\nb\tO\n\nc\tO\n",
            [{"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["c"], "tags": ["O"]}],
        ),
        (
            "a.annotated",
            "a\tO\nb\tO\n\nc\tO\n",
            [{"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["c"], "tags": ["O"]}],
        ),
        ("a.txt", "one\ntwo\n", [{"text": "one"}, {"text": "two"}]),
    ],
)
def test_files_by_kind(write: Write, reading: Reading, name: str, content: str, expected: Any) -> None:
    assert rows(open_source(str(write(name, content)), reading).train) == expected


def test_text_is_running_text_for_language_models(write: Write, reading: Reading) -> None:
    path = str(write("a.txt", "one line\n\nanother line, not a tag\n"))
    assert isinstance(open_source(path, reading).train, Lines)
    documents = Reading(documents=True, seed=0, cache_dir=reading.cache_dir)
    assert isinstance(open_source(path, documents).train, Documents)
    assert isinstance(open_source(str(write("b.txt", "a O\nb O\n\nc O\n")), documents).train, Tagging)


def test_a_sample_is_seeded_ordered_and_keeps_lines(write: Write, reading: Reading) -> None:
    path = write("a.csv", "x\n" + "".join(f"{i}\n" for i in range(100)))
    sample = open_source(f"{path}#10", reading).train
    values = [int(row["x"]) for row in rows(sample)]
    assert values == sorted(values)
    assert len(set(values)) == 10
    assert [sample.line(i) for i in range(10)] == [value + 2 for value in values]
    assert values == [int(row["x"]) for row in rows(open_source(f"{path}#10", reading).train)]
    other = Reading(documents=False, seed=8, cache_dir=reading.cache_dir)
    assert values != [int(row["x"]) for row in rows(open_source(f"{path}#10", other).train)]
    assert open_source(f"{path}#10", other).train.fingerprint() != sample.fingerprint()
    with pytest.raises(DataError, match="asks for 500 rows; the file holds 100"):
        open_source(f"{path}#500", reading)
    with pytest.raises(DataError, match="expected a number of rows after '#'"):
        open_source(f"{path}#many", reading)


def test_a_folder_with_a_file_per_class(write: Write, reading: Reading, tmp_path: Path) -> None:
    for name, text in {"a/rt.neg": "bad\n", "a/rt.pos": "good\nfine\n", "a/README.txt": "x", "SOURCE.md": "x"}.items():
        write(name, text)
    reader = open_source(str(tmp_path), reading).train  # the only folder in it is meant
    assert rows(reader) == [
        {"text": "bad", "label": "neg"},
        {"text": "good", "label": "pos"},
        {"text": "fine", "label": "pos"},
    ]
    assert (reader.file(2), reader.line(2)) == ("rt.pos", 2)
    assert "rt.neg is 'neg'" in reader.notes[-1]


def test_a_folder_with_a_folder_per_class(write: Write, reading: Reading, tmp_path: Path) -> None:
    write("pos/1.txt", "good")
    write("neg/1.txt", "bad")
    assert rows(open_source(str(tmp_path), reading).train) == [
        {"text": "bad", "label": "neg"},
        {"text": "good", "label": "pos"},
    ]


def test_a_folder_with_splits(write: Write, reading: Reading, tmp_path: Path) -> None:
    write("trainset.csv", "x\n1\n")
    write("devset.csv", "x\n2\n")
    write("test.csv", "x\n3\n")
    opened = open_source(str(tmp_path), reading)
    assert rows(opened.train) == [{"x": "1"}]
    assert opened.held_out is not None
    assert rows(opened.held_out) == [{"x": "2"}]
    assert "train is trainset.csv, evaluation is devset.csv" in opened.train.notes[-1]


def test_a_folder_of_books_is_running_text(write: Write, tmp_path: Path) -> None:
    write("one.txt", "a book")
    write("two.txt", "another")
    documents = Reading(documents=True, seed=0, cache_dir=tmp_path)
    assert [row["text"] for row in rows(open_source(str(tmp_path), documents).train)] == ["a book", "another"]


def test_a_folder_of_something_else(write: Write, reading: Reading, tmp_path: Path) -> None:
    write("a.csv", "x\n1\n")
    write("b.csv", "x\n1\n")
    with pytest.raises(DataError, match=r"holds a\.csv, b\.csv; expected train"):
        open_source(str(tmp_path), reading)


def test_names_that_stand_for_nothing(write: Write, reading: Reading, tmp_path: Path) -> None:
    write("train.csv", "x\n1\n")
    with pytest.raises(DataError, match=r"no file .*did you mean 'train\.csv'"):
        open_source(str(tmp_path / "trian.csv"), reading)
    with pytest.raises(DataError, match="of no known kind"):
        open_source(str(write("a.xyz", "text")), reading)
    with pytest.raises(DataError, match=r"the folder .* does not exist"):
        open_source("no/such/folder/file.csv", reading)


def test_a_hub_name_without_network(reading: Reading) -> None:
    with pytest.raises(DataError, match="does not load from the Hugging Face hub"):
        open_source("no-such-org/no-such-set:subset", reading)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["rt-polarity.neg", "rt-polarity.pos"], ["neg", "pos"]),
        (["plot.tok.gt9.5000", "quote.tok.gt9.5000"], ["plot", "quote"]),
        (["science.txt", "sport.txt"], ["science", "sport"]),
        (["pos.txt", "neg.txt", "neutral.txt"], ["pos", "neg", "neutral"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_class_names(names: list[str], classes: list[str]) -> None:
    assert class_names(names) == classes
