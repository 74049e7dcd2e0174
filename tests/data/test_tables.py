"""Parquet, Arrow and saved data sets, with class numbers as names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from inlay.data import tables
from inlay.errors import DataError


@pytest.fixture
def dataset() -> Dataset:
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["neg", "pos"]), "tags": List(ClassLabel(names=["O", "B"]))}
    )
    return Dataset.from_dict({"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], [1]]}, features=features)


EXPECTED = [{"text": "a", "label": "pos", "tags": ["O", "B"]}, {"text": "b", "label": None, "tags": ["B"]}]


def rows(reader: Any) -> list[dict[str, Any]]:
    return [reader.row(i) for i in range(len(reader))]


def saved(dataset: Dataset, folder: Path) -> None:
    with tables._quiet():
        dataset.save_to_disk(str(folder))


def test_parquet(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with tables._quiet():
        dataset.to_parquet(str(path))
    reader = tables.open_parquet(path, tmp_path / "cache")
    assert rows(reader) == EXPECTED
    assert reader.columns == ["text", "label", "tags"]
    assert reader.line(1) == 2


def test_parquet_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [3]}), path)
    assert rows(tables.open_parquet(path, tmp_path / "cache")) == [{"text": "x", "label": 3}]


def test_arrow_in_both_forms(dataset: Dataset, tmp_path: Path) -> None:
    saved(dataset, tmp_path / "saved")
    (stream,) = (tmp_path / "saved").glob("*.arrow")
    assert rows(tables.open_arrow(stream)) == EXPECTED
    table = pa.table({"text": ["x"]})
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert rows(tables.open_arrow(tmp_path / "file.arrow")) == [{"text": "x"}]


def test_saved_splits(dataset: Dataset, tmp_path: Path) -> None:
    with tables._quiet():
        DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "both"))
    splits = tables.open_saved(tmp_path / "both")
    assert rows(splits["train"]) == EXPECTED
    assert len(splits["test"]) == 1
    assert splits["train"].fingerprint() != splits["test"].fingerprint()


@pytest.mark.parametrize("opener", ["parquet", "arrow", "saved"])
def test_damaged_files(opener: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{opener}"
    opening: dict[str, Callable[[], Any]] = {
        "parquet": lambda: tables.open_parquet(path, tmp_path / "cache"),
        "arrow": lambda: tables.open_arrow(path),
        "saved": lambda: tables.open_saved(tmp_path),
    }
    path.write_bytes(b"PAR1 nothing of the kind")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(DataError, match=r"cannot be read as|does not load"):
        opening[opener]()
