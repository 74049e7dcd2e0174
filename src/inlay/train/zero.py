"""DeepSpeed's ZeRO for a frozen base: stage 3 shares its weights out, the adapter stays whole on each process.

The same division of labour as with FSDP2 (`distributed.shard`). DeepSpeed gathers a module's weights when it runs,
forward and backward, and lets them go again; the loop, the optimizer and the checkpoint are those of any run. Its own
optimizers are not used: stages 1 and 2 share out moments and gradients of what is trained, which here is the adapter.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from inlay.errors import ConfigError
from inlay.train.distributed import Team
from inlay.train.launcher import Zero

PERSISTENT = 100_000
"""Parameters of up to so many values stay whole, as DeepSpeed has it by default (`stage3_param_persistence_threshold`):
norms and biases, which would cost a message each."""


def share_out(model: nn.Module, adapter: Any, team: Team, zero: Zero) -> None:
    """Share the frozen weights of a model among the processes by ZeRO stage 3; below stage 3 nothing is done.

    Args:
        model: with the adapter attached, on any device: DeepSpeed takes one tensor at a time to that of this process.
        adapter: its parameters are not shared out.
        team: all processes call this together.
        zero: what the launcher was asked for.

    Raises:
        ConfigError: DeepSpeed is not installed, or there are no processes to share with.
    """
    if zero.stage < 3:
        return
    from inlay.formats.native import base_of

    if team.size == 1:
        raise ConfigError("DeepSpeed's ZeRO stage 3: there is one process, so nothing to share the weights with")
    if any(not p.is_floating_point() for p in model.parameters()):
        raise ConfigError(
            "DeepSpeed's ZeRO stage 3 does not share out weights in 4 bits; start the run without it and with fsdp: "
            "true, which does, or leave quantization out"
        )
    base_of(adapter)  # the fingerprint reads weights, so it is taken while they are whole
    _partition(model, adapter, team, zero)


def _partition(model: nn.Module, adapter: Any, team: Team, zero: Zero) -> None:
    os.environ.setdefault("DS_ACCELERATOR", team.device.type)  # it would take a GPU that the run was told to leave
    try:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils.timer import NoopTimer
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed's ZeRO stage 3 needs deepspeed ({error}): pip install deepspeed, or use fsdp: true"
        ) from error
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    section = {key: value for key, value in zero.settings.items() if value != "auto"}
    document = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}
    known = DeepSpeedConfig(document).zero_config
    persistent = known.param_persistence_threshold if "stage3_param_persistence_threshold" in section else PERSISTENT
    with _Aside(model), torch.no_grad():
        DeepSpeedZeRoOffload(
            model,
            NoopTimer(),
            document,
            overlap_comm=bool(known.overlap_comm),
            prefetch_bucket_size=known.prefetch_bucket_size,
            max_reuse_distance=known.max_reuse_distance,
            max_live_parameters=known.max_live_parameters,
            param_persistence_threshold=persistent,
            dp_process_group=dist.group.WORLD,
            offload_param_config=known.offload_param,
        )
    moved = [b for m in model.modules() for b in m.buffers(recurse=False)]
    moved += [p for piece in adapter.pieces.values() for p in piece.parameters()]
    for tensor in moved:
        tensor.data = tensor.data.to(team.device)


class _Aside:
    """Within it a model has no pieces of adapters: what goes through its modules does not see them."""

    def __init__(self, model: nn.Module) -> None:
        self.owners = [(m, m._modules["inlay"]) for m in model.modules() if m._modules.get("inlay") is not None]

    def __enter__(self) -> None:
        for module, _ in self.owners:
            del module._modules["inlay"]

    def __exit__(self, *error: object) -> None:
        for module, pieces in self.owners:
            module._modules["inlay"] = pieces
