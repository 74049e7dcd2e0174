"""Whether Triton kernels can run here, and which of several forms is the fastest for a shape.

Nothing here imports Triton. The plain form is always the first candidate, so a kernel that loses on some GPU is not
used there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from inlay.kernels import compiled

Result = TypeVar("Result")

_REPEATS = 5
_fastest: dict[Hashable, int] = {}


def usable(*tensors: Tensor) -> bool:
    """Whether Triton kernels may take these tensors: on one CUDA device of compute capability 8 or more.

    `INLAY_KERNELS=off` switches them off. Inside `torch.compile` the plain form is used: inductor fuses it itself.
    """
    return (
        all(t.is_cuda for t in tensors)
        and len({t.device for t in tensors}) == 1
        and compiled.enabled()
        and not torch.compiler.is_compiling()
        and _supported(tensors[0].device)
    )


@cache
def _supported(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def size_class(count: int) -> int:
    """Counts that vary from batch to batch share a decision with those of the same power of two."""
    return max(count - 1, 0).bit_length()


def decided(key: Hashable) -> int | None:
    """Which candidate was the fastest for this key; None if it was not met yet."""
    return _fastest.get(key)


def fastest(
    key: Hashable,
    candidates: Sequence[Callable[[], Result]],
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> Result:
    """The result of the candidate that was fastest when `key` was first met; all must give the same result.

    The first call for a key times them all, which compiles their kernels (seconds). While a CUDA graph is captured
    nothing can be timed: keys not met before take the first candidate, and are not remembered.

    Args:
        key: what the timing depends on: the operation, size classes, dtype, device.
        candidates: the plain form first.
        clock: milliseconds of a call; by default measured with CUDA events.
    """
    found = _fastest.get(key)
    if found is None:
        if clock is None and torch.cuda.is_current_stream_capturing():
            return candidates[0]()
        times = [_time(candidate, clock or _milliseconds) for candidate in candidates]
        found = _fastest[key] = times.index(min(times))
        compiled.log.info("%s: form %d of %s ms", key, found, [round(t, 4) for t in times])
    return candidates[found]()


def _time(candidate: Callable[[], object], clock: Callable[[Callable[[], object]], float]) -> float:
    try:
        candidate()
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # Triton's: a tile too large for this GPU's shared memory
            return float("inf")
        raise
    return statistics.median(clock(candidate) for _ in range(_REPEATS))


def forget() -> None:
    """Forget all decisions."""
    _fastest.clear()


def _milliseconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
