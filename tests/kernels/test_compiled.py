"""Compiling at run time: cached by source, compiler and CPU, atomic, and quiet when it cannot be done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inlay.kernels import compiled

pytestmark = pytest.mark.skipif(compiled.load("blocks4.c") is None, reason="no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "inlay" / "kernels"


SOURCE = Path(compiled.__file__).with_name("blocks4.c")


def test_compiles_once_and_leaves_nothing_else(cache: Path) -> None:
    compiled._load(SOURCE)
    (library,) = cache.iterdir()
    before = library.stat().st_mtime_ns
    compiled._load(SOURCE)
    assert [library] == list(cache.iterdir())
    assert library.stat().st_mtime_ns == before


def test_another_source_or_cpu_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._load(SOURCE)
    monkeypatch.setattr(compiled, "_cpu", lambda: "another machine that shares this home folder")
    compiled._load(SOURCE)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_library_is_replaced(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._load(SOURCE)
    (library,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    other = tmp_path / "other" / "inlay" / "kernels" / library.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"not a library")
    assert compiled._load(SOURCE).inlay_best_path() in (0, 1, 2)
    assert other.stat().st_size > 1000


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inlay").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled._load(SOURCE).inlay_best_path() in (0, 1, 2)


def test_a_broken_compiler_gives_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    assert compiled.load.__wrapped__("blocks4.c") is None
    assert list(cache.iterdir()) == []


def test_processes_that_start_at_once_share_one_library(cache: Path) -> None:
    code = "from inlay.kernels import compiled; assert compiled.load('blocks4.c') is not None"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(("value", "expected"), [("off", False), ("0", False), ("on", True), (None, True)])
def test_switch(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("INLAY_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("INLAY_KERNELS", value)
    assert compiled.enabled() is expected
