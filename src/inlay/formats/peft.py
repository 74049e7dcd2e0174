"""PEFT's adapter folders, read and written: LoRA, DoRA, AdaLoRA, IA3, prompt tuning, P-tuning, prefix tuning;
LayerNorm tuning is read.

The layout is that of PEFT 0.21. What one side has no place for is refused by name; nothing is dropped, guessed or
loaded in part. Only safetensors are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from inlay.anatomy import anatomy
from inlay.anatomy.probe import modules_of
from inlay.errors import FormatError, nearest
from inlay.folders import understood
from inlay.formats.peft_folder import Folder, Reading, read_folder, write
from inlay.formats.peft_modules import read_adalora, read_ia3, read_lora, read_norms
from inlay.formats.peft_prefix import read_prefix, write_prefix
from inlay.formats.peft_prompts import read_prompt, write_prompt
from inlay.formats.peft_write import write_modules
from inlay.methods.base import VirtualTokens
from inlay.methods.prefix import PrefixKV

if TYPE_CHECKING:
    from inlay.adapter import Adapter

READERS = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    "IA3": read_ia3,
    "LN_TUNING": read_norms,
    "PROMPT_TUNING": read_prompt,
    "P_TUNING": read_prompt,
    "PREFIX_TUNING": read_prefix,
}

LOW_RANK = "PEFT can turn it into a LoRA (peft.convert_to_lora), which is read"
REFUSED = {
    "LOHA": f"LoHa (Hadamard products): {LOW_RANK}",
    "LOKR": f"LoKr (Kronecker products): {LOW_RANK}",
    "VERA": f"VeRA (shared random matrices): {LOW_RANK}",
    "OFT": "OFT rotates weights; merge it with PEFT and load the merged model",
    "BOFT": "BOFT rotates weights; merge it with PEFT and load the merged model",
    "ADAPTION_PROMPT": "LLaMA-Adapter's gated prompts have no counterpart; Prefix or UniPELT are near",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning: save the prompt of one task as prompt tuning",
    "TRAINABLE_TOKENS": "trained rows of the embedding: merge it with PEFT and load the merged model",
}


def save(adapter: Adapter, path: Path) -> Path:
    """Writes an adapter as a folder that PEFT loads; the same bytes each time.

    Raises:
        FormatError: PEFT's format has no place for this method, or something else is in the way.
    """
    if any(isinstance(piece, VirtualTokens) for piece in adapter.pieces.values()):
        return write(path, adapter, write_prompt(adapter))
    if any(isinstance(piece, PrefixKV) for piece in adapter.pieces.values()):
        return write(path, adapter, write_prefix(adapter))
    return write(path, adapter, write_modules(adapter))


def load(
    model: nn.Module, path: Path, name: str | None = None, *, allow_other_base: bool = False, trainable: bool = True
) -> Adapter:
    """Attaches the adapter of a PEFT folder; the model is untouched if anything is wrong.

    Args:
        model: the base model.
        path: the folder of one adapter (PEFT puts adapters other than "default" into folders of their own inside).
        name: how to call it; "default" where not given, as in PEFT.
        allow_other_base: accepted for symmetry with inlay's own folders. PEFT's say nothing of the base's values; names
            and shapes are compared in any case.
        trainable: False freezes the adapter's parameters.

    Raises:
        FormatError: a method, setting or tensor that cannot be used; the message lists all.
    """
    from inlay.adapter import attach

    del allow_other_base
    with understood(path / "adapter_config.json", FormatError):
        folder = read_folder(path)
        reading = _read(folder, model)
    adapter = attach(model, reading.method, name or "default", head=reading.heads or None)
    try:
        reading.fill(adapter)
    except BaseException:
        adapter.detach()
        raise
    if not trainable:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter


def _read(folder: Folder, model: nn.Module) -> Reading:
    if folder.kind in REFUSED:
        raise FormatError(f"{folder.path} holds a {folder.kind} adapter, which is not read. {REFUSED[folder.kind]}.")
    if folder.kind not in READERS:
        raise FormatError(
            f"{folder.path} holds an adapter of type {folder.kind!r}, which is not read: "
            f"{nearest(folder.kind, READERS)}"
        )
    return READERS[folder.kind](folder, model, dict(modules_of(model)), anatomy(model))
