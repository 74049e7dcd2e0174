"""Stores: what is written comes back, appears whole, and is made anew when it is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from inlay.data import store as stores
from inlay.data.examples import Example
from inlay.data.store import ArrowStore, Counts, Making, Placed, in_memory, open_or_make, store_key, tokenizer_hash
from inlay.errors import DataError

ints = st.lists(st.integers(-100, 50_000), max_size=5)
examples = st.builds(
    Example,
    input_ids=ints,
    labels=st.none() | ints,
    token_type_ids=st.none() | st.lists(st.integers(0, 1), max_size=3),
    prompt_ids=ints,
    references=st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=2),
)


def making(*given: Example, counts: Counts | None = None) -> Making:
    placed = (Placed(example, 10 + i, i % 2, 100 + i) for i, example in enumerate(given))
    return Making(placed, counts or Counts(rows=len(given)), {"neg": 0, "pos": 1}, {"a.csv": 0, "b.csv": 1})


@given(st.lists(examples, max_size=7), st.integers(1, 3))
def test_examples_come_back(given: list[Example], per_batch: int) -> None:
    before = stores.ROWS_PER_BATCH
    stores.ROWS_PER_BATCH = per_batch
    try:
        store = in_memory(making(*given))
    finally:
        stores.ROWS_PER_BATCH = before
    assert [store.example(i) for i in range(len(store))] == given
    assert store.lengths.tolist() == [max(len(e.input_ids), len(e.labels or [])) for e in given]
    assert [store.row(i) for i in range(len(store))] == store.rows().tolist() == [10 + i for i in range(len(given))]
    assert [store.origin(i) for i in range(len(store))] == [f"{'ab'[i % 2]}.csv:{100 + i}" for i in range(len(given))]
    assert store.first_labels().tolist() == [(e.labels or [-1])[0] for e in given]


ONE = Example([1, 2], [3], references=["x"])


def test_a_store_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> Making:
        calls.append(folder)
        (folder / "skipped.jsonl").write_text("{}\n")
        return making(ONE, counts=Counts(rows=1, cut=1, notes={"odd": 2}))

    folder = tmp_path / "cache" / "key"
    first, happened = open_or_make(folder, make)
    second, again = open_or_make(folder, make)
    assert (happened, again, len(calls)) == ("made", "", 1)
    assert first.example(0) == second.example(0) == ONE
    assert second.names == ["neg", "pos"]
    assert second.counts == Counts(rows=1, cut=1, notes={"odd": 2})
    assert (folder / "skipped.jsonl").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("file", ["examples.arrow", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_store_is_made_anew(tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "key"
    open_or_make(folder, lambda aside: making(ONE))
    path = folder / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-20]), "empty": b""}[damage])
    store, happened = open_or_make(folder, lambda aside: making(ONE))
    # A flipped bit of the manifest may hit a name or a number that is only reported.
    assert happened == "rebuilt" or (file, damage) == ("manifest.json", "flip")
    assert store.example(0) == ONE


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Placed]:
        yield Placed(ONE, 0, 0, 1)
        raise DataError("a bad row")

    with pytest.raises(DataError, match="a bad row"):
        open_or_make(tmp_path / "key", lambda aside: Making(broken(), Counts(), {}, {}))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=f"cannot be kept in {tmp_path}: No space left on device"):
        open_or_make(tmp_path / "key", lambda aside: making(ONE))
    assert list(tmp_path.iterdir()) == []


def test_of_two_who_make_one_store_the_first_wins(tmp_path: Path) -> None:
    folder = tmp_path / "key"

    def slow(aside: Path) -> Making:
        open_or_make_elsewhere(folder)
        return making(Example([9]))

    def open_or_make_elsewhere(target: Path) -> None:
        stores._write(_made(target.with_name("elsewhere")), making(ONE))
        os.rename(target.with_name("elsewhere"), target)

    store, _ = open_or_make(folder, slow)
    assert store.example(0) == ONE
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_keys_cover_every_part() -> None:
    key = store_key(rows="a", max_length=10)
    assert key == store_key(max_length=10, rows="a")
    assert len({key, store_key(rows="b", max_length=10), store_key(rows="a", max_length=11)}) == 3


def test_keys_cover_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = store_key(rows="a")
    monkeypatch.setattr(stores, "_MODULES", stores._MODULES[:-1])
    assert key != store_key(rows="a")
    source = Path(stores.__file__).parent
    assert all((source / f"{module}.py").is_file() for module in stores._MODULES)


def test_the_hash_of_a_tokenizer(chat_tok: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = chat_tok()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)  # leaves settings in the backend
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(chat_tok())
    assert tokenizer_hash(chat_tok("{{ messages[0]['content'] }}")) != before
    tokenizer.add_tokens(["new"])
    assert tokenizer_hash(tokenizer) != before


def test_a_store_without_examples() -> None:
    store = in_memory(making())
    assert isinstance(store, ArrowStore)
    assert len(store) == 0
    assert store.rows().tolist() == []
