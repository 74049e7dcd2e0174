"""Tensors of which each process holds a part (DTensor, as FSDP2 leaves them), made whole and filled.

Both are collective: every process of the mesh must call them alike. For a plain tensor they do the plain thing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's values."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        values = distribute_tensor(values.to(sharded.device), sharded.device_mesh, sharded.placements)
    tensor.copy_(values)


def writes() -> bool:
    """Whether this process is the one that writes what all have gathered."""
    import torch.distributed as dist

    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
