"""One reused CPU buffer for a dense weight that lives only as long as one matrix product.

glibc maps and unmaps an allocation above 32 MiB at every call, and filling fresh pages runs at a tenth of the speed
of memory. The buffer belongs to the calling thread, so that data-parallel threads do not share it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Local(threading.local):
    buffer: Tensor | None = None


_local = _Local()


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised vector of `count` elements, valid until this thread asks again.

    Never let it, or a view of it, leave the function that asked: not as a result, not into an autograd graph. Other
    devices than the CPU have caching allocators and get a fresh tensor.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    needed = count * dtype.itemsize
    if _local.buffer is None or _local.buffer.numel() < needed:
        _local.buffer = None  # free the old one before the new one is there
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside of it
            _local.buffer = torch.empty(needed, dtype=torch.uint8)
    return _local.buffer[:needed].view(dtype)


def release_scratch() -> None:
    """Give the buffer of this thread back to the system."""
    _local.buffer = None
