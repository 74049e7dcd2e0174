"""What is on disk: inlay's own folders (`native.py`) and PEFT's (`peft.py`), told apart by the file that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.errors import FormatError

if TYPE_CHECKING:
    from inlay.adapter import Adapter


def read(model: nn.Module, path: Path, name: str | None = None, **options: Any) -> Adapter:
    """Attaches the adapter in a folder to a model.

    Raises:
        FormatError: the path is not an adapter folder, or the folder is damaged, foreign, or newer.
    """
    if not path.is_dir():
        raise FormatError(f"{path} is not a folder. An adapter folder holds adapter.json and adapter.safetensors.")
    if (path / "adapter.json").exists():
        from inlay.formats import native

        return native.load(model, path, name, **options)
    if (path / "adapter_config.json").exists():
        from inlay.formats import peft

        return peft.load(model, path, name, **options)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FormatError(f"{path} holds neither adapter.json (inlay) nor adapter_config.json (PEFT); it holds {found}.")
