"""The shape of the source itself: every file says what it is for, and none outgrows one responsibility."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "inlay").rglob("*.py"))
LONGEST = 450


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_has_a_docstring_and_a_bounded_length(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    lines = len(text.splitlines())
    assert lines <= LONGEST, f"{path} has {lines} lines, more than {LONGEST}: split it by responsibility"


def test_sources_were_found():
    assert any(path.name == "errors.py" for path in SOURCES)
