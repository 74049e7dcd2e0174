"""Tensors of which each process holds a part, made whole and filled: FSDP2's (DTensor) and those of DeepSpeed's ZeRO 3.

All of it is collective: every process must call it alike. For a plain tensor each function does the plain thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's values."""
    sharded: Any = tensor
    if hasattr(tensor, "full_tensor"):
        return sharded.full_tensor()  # type: ignore[no-any-return]
    if hasattr(tensor, "ds_id"):
        with gathered([sharded]):
            return tensor.detach().clone()
    return tensor


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of all of a tensor."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def size_of(tensor: Tensor) -> int:
    """The number of values of a tensor, whether or not they are here."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, filled: bool = False) -> Iterator[None]:
    """Within it, parameters that ZeRO 3 has shared out are whole; FSDP2's stay as they are.

    Args:
        parameters: any.
        filled: they get new values within, the same on every process.
    """
    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shared:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(shared, modifier_rank=0 if filled else None):
        yield


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor; one of ZeRO 3's must be gathered."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        values = distribute_tensor(values.to(sharded.device), sharded.device_mesh, sharded.placements)
    tensor.copy_(values)


def writes() -> bool:
    """Whether this process is the one that writes what all have gathered."""
    import torch.distributed as dist

    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
