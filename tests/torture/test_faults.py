"""Every single write, rename, fsync, mkdir and unlink of a save fails, or is where the process dies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torture

HERE = Path(__file__).parent
MODES = ("kill", "kill inside a write", "disk full from there on", "no permission from there on", "one I/O error")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """faults.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(HERE / "faults.c"), "-o", str(path), "-ldl"], check=True)
    return path


@pytest.mark.parametrize("mode", range(len(MODES)), ids=MODES)
@pytest.mark.parametrize("act", ["next", "again", "adapter"])
def test_a_fault_at_every_operation(library, tmp_path, act, mode):
    command = [sys.executable, str(HERE / "fault_worker.py"), str(library), str(tmp_path / "world"), act, str(mode)]
    paths = [str(HERE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["faults"] > (8 if act == "adapter" else 30), counts
    assert counts["old"], counts
    print(f"{act}, {MODES[mode]}: {counts['faults']} faults, {counts['old']} left the old, {counts['new']} the new")
