"""What every test run shares: no network, one thread per worker, fixed seeds, the folder of real data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or a Hugging Face library: they read these once. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # read where a kernel is defined, Triton's own among them
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run and no deadline for one: a red test is then a fault, never a slow machine.
hypothesis.settings.register_profile(
    "inlay",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("inlay")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "torture" in item.keywords and not config.getoption("--torture"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make torture"))
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Each test starts from the same random state and without the process-wide state of accelerate."""
    torch.manual_seed(0)
    yield
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()


@pytest.fixture(scope="module")
def natively() -> Iterator[None]:
    """Tensors are made on the GPU, where Triton's kernels are compiled; without one its interpreter runs them."""
    with torch.device("cuda" if GPU else "cpu"):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real test data: INLAY_SHARED, or `shared` beside the repository; skips where absent."""
    path = Path(os.environ.get("INLAY_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no test data in {path} (set INLAY_SHARED)")
    return path
