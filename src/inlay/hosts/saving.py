"""The host that keeps `save_pretrained` from losing an adapter: the base's checkpoint has no place for one."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from inlay.hosts.base import Host, hosted_class, is_intact

MARK = ".inlay."
"""Stands in the name of every tensor of an adapter in its model's state dict, and in no other."""
FOLDER = "adapters"
"""Where the adapters of a saved model lie, each as a folder for `inlay.load`."""


class SavingHost(Host):
    """Swapped in as a model's class while adapters are attached.

    `save_pretrained` writes what it always does, all tensors of the state dict, so that trainers that save and load
    checkpoints through it go on exactly. `from_pretrained` would drop those of adapters, so they are written as
    `adapters/<name>` too, and a warning says how to load them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own: Any = cls.__dict__.get("base")
        if not hasattr(own, "save_pretrained") or issubclass(own, SavingHost):
            return

        @functools.wraps(own.save_pretrained)
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **options: Any) -> Any:
            saved = super(cls, self).save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
            tensors = options.get("state_dict", args[1] if len(args) > 1 else None)
            if tensors is None or any(MARK in name for name in tensors):
                _save_beside(
                    self, Path(save_directory), write=options.get("is_main_process", args[0] if args else True)
                )
            return saved

        cls.save_pretrained = save_pretrained  # type: ignore[attr-defined]


def _save_beside(model: nn.Module, folder: Path, *, write: bool) -> None:
    from inlay.state import adapters

    merged = [name for name, adapter in adapters(model).items() if adapter.merged]
    apart = save_adapters(model, folder, write=write)
    if not write:
        return
    said = [f"the weights in {folder} hold merged {merged}; inlay.export writes such a model alone"] if merged else []
    if apart:
        said.append(
            f"from_pretrained({str(folder)!r}) gives the base without {apart}; "
            f"inlay.load(model, {str(folder / FOLDER / apart[0])!r}) puts one back. adapter.save(folder) writes an "
            "adapter alone, and inlay.InlayCallback() keeps the base out of a Trainer's checkpoints"
        )
    if said:
        warnings.warn("; ".join(said) + ".", stacklevel=3)


def save_adapters(model: nn.Module, folder: Path, *, write: bool) -> list[str]:
    """Writes each adapter that is not merged as `adapters/<name>` in a folder; where tensors are shared out, all
    processes must call. Returns the names.
    """
    import torch.distributed as dist

    from inlay.state import adapters

    found = {name: adapter for name, adapter in adapters(model).items() if not adapter.merged}
    if write or (dist.is_available() and dist.is_initialized()):
        for name, adapter in found.items():
            adapter.save(folder / FOLDER / name)
    return list(found)


def keep_adapters(model: nn.Module) -> None:
    """Makes a model that can save itself a host, once."""
    if hasattr(model, "save_pretrained") and not isinstance(model, Host):
        model.__class__ = hosted_class(SavingHost, type(model))


def leave(model: nn.Module) -> None:
    """Gives a model its own class back, unless something else was put over it since."""
    if isinstance(model, SavingHost) and is_intact(model):
        model.__class__ = type(model).base  # type: ignore[assignment]
