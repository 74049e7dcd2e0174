"""The public names of inlay.data, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import inlay.data


def test_every_public_name_is_there() -> None:
    for name in inlay.data.__all__:
        assert getattr(inlay.data, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        inlay.data.nothing  # noqa: B018


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, inlay.data; from inlay.data import prepare, prepare_infer, Batches, DataSpec, find_layout;"
        "import inlay.data.show, inlay.data.demo, inlay.data.tables;"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'matplotlib', 'rich', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
