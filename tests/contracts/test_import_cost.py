"""What must answer at once imports nothing heavy; checked by what is loaded, since times vary."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "pydantic", "sklearn", "torch", "transformers"}


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after running `code`."""
    report = "import sys; print('\\n'.join(sys.modules))"
    script = f"try:\n    exec({code!r})\nexcept SystemExit as e:\n    assert not e.code, e.code\n{report}"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return HEAVY & {line.partition(".")[0] for line in done.stdout.splitlines()}


def test_the_probe_itself_sees_heavy_imports():
    assert loaded_after("import numpy") == {"numpy"}


def test_import_inlay_is_light():
    assert loaded_after("import inlay; dir(inlay); inlay.errors; inlay.__version__") == set()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_command_line_answers_without_heavy_imports(flag):
    call = f"import sys; sys.argv = ['inlay', {flag!r}]; from inlay.cli import main; main()"
    assert loaded_after(call) == set()
