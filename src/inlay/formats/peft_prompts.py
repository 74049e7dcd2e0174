"""PEFT folders of virtual tokens: prompt tuning and P-tuning, read and written.

One tensor, `prompt_embeddings`, holds one row for each virtual token, before everything else in the text. In an
encoder-decoder it has twice as many rows, of which only the first half is used. A network that made the tokens is not
kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy
from inlay.errors import FormatError
from inlay.formats.peft_folder import Folder, Reading, Writing, check_settings, no_format, refuse
from inlay.formats.peft_modules import base_modules, fill_heads, sort_tensors
from inlay.methods.full import Copy
from inlay.methods.p_tuning import PTuning, PTuningTokens
from inlay.methods.prompt import Borrowed, Prompt, PromptTokens

if TYPE_CHECKING:
    from inlay.adapter import Adapter

PREFIX = "base_model."
TENSOR = "prompt_embeddings"
USED = {"num_virtual_tokens", "token_dim", "num_transformer_submodules"}
UNUSED = {"num_attention_heads", "num_layers"}
MADE_BY = {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
}  # fmt: skip


def read_prompt(folder: Folder, model: nn.Module, modules: dict[str, nn.Module], anatomy: Anatomy) -> Reading:
    """Prompt tuning, or P-tuning's result. The virtual tokens stand before everything, [CLS] included."""
    check_settings(folder, USED | UNUSED | MADE_BY, {})
    length, size = int(folder.setting("num_virtual_tokens", 0)), anatomy.hidden_size
    rows = length * int(folder.setting("num_transformer_submodules", 1))
    found = sort_tensors(Folder(folder.path, folder.config, without(folder, TENSOR)), modules, PREFIX)
    table = folder.tensors.get(TENSOR)
    if table is None:
        found.problems.append(f"missing {TENSOR}")
    elif tuple(table.shape) != (rows, size) or length < 1:
        found.problems.append(f"wrong shape {TENSOR}: {tuple(table.shape)} instead of {(rows, size)}")
    heads, _ = base_modules(folder, found, model, modules)
    refuse(folder, found.problems)
    assert table is not None
    if folder.kind == "P_TUNING":
        method: Prompt | PTuning = PTuning(
            template=f"{{prompt:{length}}} {{text}}", encoder="mlp", places=((0, length),)
        )
    else:
        method = Prompt(length=length, init="uniform", after=0)

    def fill(adapter: Adapter) -> None:
        fill_heads(adapter, found)
        for piece in adapter.pieces.values():
            if isinstance(piece, PromptTokens | PTuningTokens):
                piece.load_stored({"h" if isinstance(piece, PTuningTokens) else "P": table[:length]})

    return Reading(method, heads, fill)


def without(folder: Folder, *names: str) -> dict[str, Tensor]:
    """The tensors of a folder but these."""
    return {name: tensor for name, tensor in folder.tensors.items() if name not in names}


def write_prompt(adapter: Adapter) -> Writing:
    """What to write for virtual tokens.

    Raises:
        FormatError: the virtual tokens stand elsewhere than before the text, or there are several pieces.
    """
    pieces = [p for p in adapter.pieces.values() if not isinstance(p, Borrowed | Copy)]
    if len(pieces) != 1 or not isinstance(pieces[0], PromptTokens | PTuningTokens):
        raise no_format(adapter)
    piece = pieces[0]
    places = piece.places or ()
    if tuple(places) != ((0, piece.length),):
        raise FormatError(
            f"PEFT puts virtual tokens before everything, and these stand at {tuple(places)}: in an encoder behind its "
            'first token, or where a template puts them. Use Prompt(after=0), or save with format="native".'
        )
    (table,) = piece.stored().values()
    both = bool(getattr(adapter.model.config, "is_encoder_decoder", False))
    settings: dict[str, Any] = {
        "num_virtual_tokens": piece.length,
        "token_dim": table.shape[1],
        "num_transformer_submodules": 2 if both else 1,
        "num_attention_heads": None,
        "num_layers": None,
    }
    if isinstance(piece, PTuningTokens):
        kind = "P_TUNING"
        settings |= {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": table.shape[1]}
        settings |= {"encoder_num_layers": 2, "encoder_dropout": 0.0}
    else:
        kind = "PROMPT_TUNING"
        settings |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
        settings |= {"tokenizer_name_or_path": None, "tokenizer_kwargs": None}
    writing = Writing(kind, settings, {TENSOR: torch.cat([table, table]) if both else table})
    add_heads(adapter, writing)
    return writing


def add_heads(adapter: Adapter, writing: Writing) -> None:
    """The trained head of an adapter without pieces on modules."""
    copies = [(s, p) for s, p in zip(adapter.sites, adapter.pieces.values(), strict=True) if isinstance(p, Copy)]
    for site, piece in copies:
        writing.tensors.update({f"{PREFIX}{site.leave}.{name}": t for name, t in piece.stored().items()})
    if copies:
        tops = sorted({site.leave.partition(".")[0] for site, _ in copies})
        if not set(tops) <= {"classifier", "score", "qa_outputs"}:
            raise FormatError(
                f"beside virtual tokens PEFT trains heads named 'classifier', 'score' or 'qa_outputs', not {tops}. "
                'Save with format="native".'
            )
        writing.settings["modules_to_save"] = tops
