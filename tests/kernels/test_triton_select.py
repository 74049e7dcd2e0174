"""Which form is taken: the fastest at first sight, remembered for the shape class, never a kernel off CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from inlay.kernels import triton_select as select


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    select.forget()


def test_the_fastest_is_found_once_and_kept() -> None:
    calls: list[str] = []
    cost = {"plain": 3.0, "kernel": 1.0, "other": 2.0}

    def form(name: str) -> Callable[[], str]:
        def run() -> str:
            calls.append(name)
            return name

        return run

    forms = [form(name) for name in cost]

    def clock(call: Callable[[], object]) -> float:
        return cost[str(call())]

    assert select.fastest("key", forms, clock) == "kernel"
    calls.clear()
    cost["kernel"] = 99.0
    assert select.fastest("key", forms, clock) == "kernel"
    assert calls == ["kernel"]
    assert select.fastest("another key", forms, clock) == "other"


def test_a_form_too_large_for_the_gpu_is_never_taken() -> None:
    class OutOfResources(Exception):
        pass

    def too_large() -> str:
        raise OutOfResources

    def broken() -> str:
        raise ValueError

    def clock(call: Callable[[], object]) -> float:
        call()
        return 1.0

    assert select.fastest("key", [lambda: "plain", too_large], clock) == "plain"
    with pytest.raises(ValueError):  # noqa: PT011
        select.fastest("other", [lambda: "plain", broken], clock)


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert select.fastest("key", [lambda: "plain", lambda: "kernel"]) == "plain"
    assert select.fastest("key", [lambda: "plain", lambda: "kernel"], lambda call: float(call() == "plain")) == "kernel"


def test_size_classes_are_powers_of_two() -> None:
    classes = [select.size_class(n) for n in (1, 2, 3, 4, 5, 1024, 1025, 2048)]
    assert classes == [0, 1, 2, 2, 3, 10, 11, 11]


def test_the_cpu_never_takes_a_triton_kernel() -> None:
    assert not select.usable(torch.zeros(2))
