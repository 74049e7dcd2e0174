"""The embedded task: the same everywhere, ten classes, 600 held out, nothing twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from inlay.data import demo
from inlay.errors import DataError


@pytest.fixture(scope="module")
def task() -> list[demo.Docstring]:
    return demo.read_stdlib()


def test_size_and_classes(task: list[demo.Docstring]) -> None:
    counts = Counter(row.label for row in task)
    assert set(counts) == set(demo.AREAS)
    assert len(counts) == 10
    assert 5000 < len(task) < 6500
    assert max(counts.values()) < 0.16 * len(task)
    assert min(counts.values()) > 200


def test_texts_are_distinct_and_say_something(task: list[demo.Docstring]) -> None:
    texts = [row.text for row in task]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= demo.SHORTEST and "\n" not in text for text in texts)


def test_no_module_has_two_areas() -> None:
    modules = [module for area in demo.AREAS.values() for module in area.split()]
    assert len(set(modules)) == len(modules)


def test_a_changed_docstring_moves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HELD_OUT", 20)

    def held_out(changed: str) -> set[str]:
        functions = [f'def f{i}():\n    """Says what function number {i} does."""\n' for i in range(100)]
        functions[50] = f'def f():\n    """{changed}"""\n'
        (tmp_path / "queue.py").write_text("".join(functions[:60]))
        (tmp_path / "json.py").write_text("".join(functions[60:]))
        return {row.text for row in demo.read_stdlib(tmp_path)[:20]}

    before, after = held_out("The docstring of one release."), held_out("The docstring of the next one.")
    assert len(before & after) >= 19


def test_paragraphs_are_found_in_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HELD_OUT", 1)
    source = '''"""The module itself,
    on two lines.

    A second paragraph.
    """
if True:
    class A:
        """A class inside a condition."""
        async def f(self):
            """A coroutine of that class."""
            def g():
                """A function in a function."""
try:
    x = "not a docstring at all, really"
except ValueError:
    pass
def short():
    """Too short."""
def same():
    """Stands in two areas."""
'''
    (tmp_path / "queue.py").write_text(source)
    (tmp_path / "json.py").write_text('def same():\n    """Stands in two areas."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "email" / "test").mkdir(parents=True)
    (tmp_path / "email" / "test" / "x.py").write_text('"""A test is not part of the task."""\n')
    found = {row.text: row.origin for row in demo.read_stdlib(tmp_path)}
    assert found == {
        "The module itself, on two lines.": "queue.py:1",
        "A class inside a condition.": "queue.py:7",
        "A coroutine of that class.": "queue.py:9",
        "A function in a function.": "queue.py:11",
    }


def test_files_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: list[demo.Docstring]) -> None:
    monkeypatch.setattr(demo, "read_stdlib", lambda root: task)
    train, held_out = demo.files(tmp_path)
    rows = [json.loads(line) for path in (train, held_out) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(held_out.read_text(encoding="utf-8").splitlines()) == 600
    assert len({row["text"] for row in rows}) == len(rows)
    stamp = train.stat().st_mtime_ns
    assert demo.files(tmp_path) == (train, held_out)
    assert train.stat().st_mtime_ns == stamp


def test_an_installation_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 docstrings"):
        demo.read_stdlib(tmp_path)
