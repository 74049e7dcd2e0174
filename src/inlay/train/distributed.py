"""Several processes that train one adapter: what they tell each other, and how they share the frozen weights.

The adapter is small, so each process holds it whole and its gradient is summed once per optimizer step; that alone is
data parallelism. The base is large and frozen, so nothing of it is ever summed: it is replicated, or sharded by FSDP2
(`fully_shard`), where every block is gathered when it runs and let go again. Both are one code path, an optimizer sees
ordinary tensors, and a checkpoint is the same folder whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inlay.errors import CheckpointError, ConfigError, TrainingError

if TYPE_CHECKING:
    from inlay.config import RunConfig

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
"""Gradients that travel together: large enough for the network, small beside the model."""

_GONE = ("connection closed", "connection reset", "connection refused", "broken pipe", "gloo", "nccl", "socket", "tcp")
"""Words of the errors that backends raise when another process no longer answers."""


class Team:
    """The processes of a run. With one alone every method gives back what it got.

    Attributes:
        size, rank: how many they are, and which one this is.
        main: whether it is the one that writes and prints.
        device: where tensors must be for the processes to exchange them.
    """

    def __init__(self, accelerator: Any) -> None:
        self.size: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def of_main(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        shared: list[Any] = [value]
        dist.broadcast_object_list(shared, device=self.device if self.device.type == "cuda" else None)
        return shared[0]  # type: ignore[no-any-return]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            self.sum(torch.zeros((), device=self.device))

    def share_start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the main one's values, whatever its own random generator drew."""
        if self.size == 1:
            return
        with torch.no_grad():
            for bucket in _buckets([parameter.data for parameter in parameters]):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                dist.broadcast(flat, 0)
                _fill(bucket, flat)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; none stays none only where no process has one."""
        if self.size == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=self.device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        gradients = []
        for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
            if not somewhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            _fill(bucket, flat)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Tell a lost process from other failures.

        Args:
            what: how the run is to be gone on with.

        Raises:
            TrainingError: another process of the run no longer answers.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.size == 1 or isinstance(error, TrainingError) or not any(word in text for word in _GONE):
                raise
            first = str(error).strip().split("\n")[0][:200]
            raise TrainingError(
                f"process {self.rank} of {self.size}: another process of this run has ended or no longer answers "
                f"({first}). Its own message says why. {what}"
            ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device at a time, up to `BUCKET_BYTES` of them."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _fill(bucket: Sequence[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def shard(model: nn.Module, adapter: Any, team: Team) -> None:
    """Share the frozen weights of a model among the processes, block by block; the adapter stays whole on each.

    A block's weights are gathered when it runs, forward and backward. Packed 4-bit weights are shared as the bytes they
    are; their scales (1/8 of them, 1/32 with double quantisation) stay whole.

    Args:
        model: with the adapter attached, on any device.
        adapter: its parameters are not sharded.
        team: all processes call this together.

    Raises:
        ConfigError: there are no processes to share with.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import inlay
    from inlay.formats.native import base_of

    if team.size == 1:
        raise ConfigError(
            "fsdp: there is one process, so nothing to share the weights with; start the run with torchrun or "
            "accelerate launch, or leave fsdp out"
        )
    base_of(adapter)  # the fingerprint reads weights, so it is taken while they are whole
    ours = {parameter for piece in adapter.pieces.values() for parameter in piece.parameters()}
    buffers = [buffer for piece in adapter.pieces.values() for buffer in piece.buffers()]
    for tensor in [*ours, *buffers]:
        tensor.data = tensor.data.to(team.device)
    mesh = init_device_mesh(team.device.type, (team.size,))
    modules = dict(model.named_modules())
    for block in inlay.anatomy(model).blocks:
        fully_shard(modules[block.path], mesh=mesh, ignored_params=ours)
    fully_shard(model, mesh=mesh, ignored_params=ours)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights from all processes, so that they all must make as many."""
    if hasattr(model, "ds_inflight_param_registry"):  # DeepSpeed's ZeRO stage 3
        return True
    return any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)  # by name: its module is slow to import


def same_step(config: RunConfig, batches_per_step: int | None, team: Team) -> RunConfig:
    """The configuration with as many batches a step as a run had that is resumed on another number of processes.

    Raises:
        CheckpointError: they cannot be divided evenly among these processes.
    """
    if batches_per_step is None or batches_per_step == config.gradient_accumulation_steps * team.size:
        return config
    if batches_per_step % team.size:
        fitting = ", ".join(str(n) for n in range(1, batches_per_step + 1) if batches_per_step % n == 0)
        raise CheckpointError(
            f"a step of this run is {batches_per_step} batches, which {team.size} processes cannot share evenly; "
            f"resume on {fitting}"
        )
    return config.model_copy(update={"gradient_accumulation_steps": batches_per_step // team.size})
