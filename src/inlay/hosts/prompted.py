"""One forward pass with virtual tokens: ordinary ids in, outputs that line up with them out.

The model itself sees longer rows, with the virtual ids in their places, and masks, types, labels and positions to
match; so its loss is that of the user's labels. Positions that the user did not give are left to the model.

Legend: B rows, T columns of the user, N most virtual tokens of a row, S = T + N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.errors import AdapterError, AttachmentError
from inlay.hosts.embedding import Serving
from inlay.hosts.layout import Layout

MARK = "_inlay_prompts"
IGNORED = -100

FILLS = {
    "attention_mask": (0, 1),
    "token_type_ids": (0, 0),
    "mm_token_type_ids": (0, 0),
    "special_tokens_mask": (1, 1),
    "global_attention_mask": (0, 0),
}
"""What stands at padding and at virtual tokens in the inputs that have one value for each token."""

WHOLE = ("attentions", "past_key_values", "mems", "loss")
"""Outputs that keep the virtual tokens: attention maps show them, caches need them."""


@dataclass(eq=False)
class Extended:
    """The inputs of a call after the virtual tokens were put in."""

    inputs: dict[str, Any]
    layout: Layout | None
    user: int = 0
    uneven: bool = False


@dataclass(eq=False)
class Filled:
    """What is remembered on a cache that holds virtual tokens."""

    layout: Layout
    user: int
    uneven: bool
    mask_BS: Tensor | None


def run(model: Any, frozen: Callable[..., Any], given: dict[str, Any], serving: Serving) -> Any:
    """The model's output for the user's inputs, with the virtual tokens of each row at work.

    Args:
        model: the hosted model.
        frozen: its own forward.
        given: all arguments by name.
        serving: the virtual tokens.

    Raises:
        AdapterError: inputs that virtual tokens cannot be put into; the message says which and what to do.
    """
    cache = given.get("past_key_values")
    decodes = "decoder_input_ids" in model.takes
    if cache is not None and not decodes and int(cache.get_seq_length()) > 0:
        return frozen(**_continued(cache, given))
    extended = extend(model, given, serving)
    layout = extended.layout
    if layout is None:
        return frozen(**extended.inputs)
    inputs = extended.inputs
    keep = _keep(inputs, layout, extended.user) if "logits_to_keep" in model.takes else None
    copied = decodes and _copied(model, given, serving)
    as_dict = _as_dict(model, inputs)
    output = frozen(**inputs)
    ahead = not decodes and hasattr(model, "generate")
    output = _take_back(output, layout, ahead=ahead, keep=keep, encoder_only=decodes and not copied)
    found = getattr(output, "past_key_values", None)
    if found is not None and not decodes:
        setattr(found, MARK, Filled(layout, extended.user, extended.uneven, inputs.get("attention_mask")))
    return output if as_dict or not hasattr(output, "to_tuple") else output.to_tuple()


def extend(model: Any, given: dict[str, Any], serving: Serving, *, left: bool = False) -> Extended:
    """The inputs with the virtual tokens put in; unchanged where the user's ids hold them already.

    Args:
        left: put the padding of rows with fewer virtual tokens before them instead of behind them.

    Raises:
        AdapterError: the inputs do not say where, or are of a form that cannot be extended.
    """
    name_of_ids = "input_ids" if "input_ids" in model.takes else model.takes[0]
    ids: Any = given.get(name_of_ids)
    embeds: Any = given.get("inputs_embeds")
    source = ids if ids is not None else embeds[..., 0] if embeds is not None else None
    if not isinstance(source, Tensor) or source.ndim < 2 or (ids is not None and source.is_floating_point()):
        raise AdapterError(_without_ids(model, given))
    _refuse_changed(model, serving)
    _refuse_packed(given, source)
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != source.shape):
        raise AdapterError(
            "virtual tokens are put into rows whose attention_mask has one value for each token id "
            f"{tuple(source.shape)}, not {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. "
            "Pass a mask of that shape, or ids that hold the virtual tokens already, with a mask that covers them."
        )
    user = source.shape[-1]
    layout, uneven = _lay_out(serving, source, mask, embedded=ids is None, left=left)
    if layout is None:
        return Extended(given, None)
    inputs = dict(given)
    if mask is None and uneven:
        if "attention_mask" not in model.takes:
            raise AdapterError(
                f"{type(model).__name__} takes no attention_mask, so rows of one batch cannot have prompts of "
                "different length. Run them one adapter at a time."
            )
        inputs["attention_mask"] = mask = torch.ones_like(source, dtype=torch.long)

    def spread(x: Tensor, pad: int, virtual: int | Tensor) -> Tensor:
        flat = layout.spread(x.reshape(-1, user, *x.shape[source.ndim :]), pad, virtual)
        return flat.reshape(*source.shape[:-1], layout.width, *x.shape[source.ndim :])

    rows = source[..., 0].numel()
    if ids is not None:
        inputs[name_of_ids] = spread(ids, pad_id(model), serving.prompts.ids(rows, ids.device))
    else:
        _refuse_unpadded(model, uneven)
        inputs["inputs_embeds"] = spread(embeds, 0, _embedded(serving, rows, embeds))
    for name, value in given.items():
        per_token = isinstance(value, Tensor) and value.shape[: source.ndim] == source.shape
        if name in FILLS and value is not None:
            inputs[name] = spread(value, *FILLS[name])
        elif name == "position_ids" and value is not None:
            inputs[name] = _positions(layout, value, source)
        elif name == "labels" and per_token and _labels_tokens(model, value):
            inputs[name] = spread(value, IGNORED, IGNORED)
        elif name in ("start_positions", "end_positions") and value is not None:
            inputs[name] = layout.columns(value.reshape(-1)).reshape(value.shape)
        elif per_token and name != name_of_ids and not _known(name):
            raise AdapterError(
                f"{name} has one value for each token id, and inlay does not know what it is at a virtual token. "
                f"Put the virtual ids in yourself (ids from {serving.prompts.first} on) and give {name} for them too."
            )
    if mask is not None:
        inputs["attention_mask"] = spread(mask, *FILLS["attention_mask"])
    return Extended(inputs, layout, user, uneven)


def _lay_out(
    serving: Serving, source: Tensor, mask: Tensor | None, *, embedded: bool, left: bool
) -> tuple[Layout | None, bool]:
    """The layout, and whether some rows get padding; None where nothing has to be put in."""
    prompts = serving.prompts
    flat = source.reshape(-1, source.shape[-1])
    mask_BT = mask.reshape(flat.shape) if mask is not None else None
    rows, device = flat.shape[0], flat.device
    _, _, tokens_B, size_B, placed_B = prompts.tables(rows, device)
    virtual_BT = torch.zeros_like(flat, dtype=torch.bool) if embedded else flat >= prompts.first
    own_B = virtual_BT.any(1)
    if not _readable(flat):
        torch._assert_async((own_B | placed_B).all(), UNPLACED)
        if not prompts.most:
            return None, False
        return prompts.spread(flat, mask_BT, left=left, own_B=own_B), True
    wrong_BT = virtual_BT & (flat - prompts.first >= size_B[:, None])
    late_B = mask_BT[:, 0] == 0 if mask_BT is not None else torch.zeros_like(own_B)
    flags = own_B.any(), (own_B | (tokens_B == 0)).all(), wrong_BT.any(), (own_B | placed_B).all(), late_B.any()
    some_own, all_own, wrong, placed, late = torch.stack(flags).tolist()
    if wrong:
        row, column = (int(i) for i in wrong_BT.nonzero()[0])
        raise AdapterError(
            f"row {row} holds id {int(flat[row, column])} at position {column}: ids from {prompts.first} on are "
            f"virtual tokens, and the adapters of this row have {int(size_B[row])} of them."
        )
    if not placed:
        raise AdapterError(UNPLACED)
    if all_own:
        return None, False
    if prompts.front and not some_own and not late:
        return prompts.at_front(rows, flat.shape[1], device), False
    uneven = prompts.uneven or bool(some_own)
    return prompts.spread(flat, mask_BT, left=left, own_B=own_B if some_own else None), uneven


UNPLACED = (
    "the places of this adapter's virtual tokens depend on the text, so ordinary token ids do not say where they go. "
    "Encode the rows with inlay.fill_template(adapter, tokenizer, rows)."
)


def _readable(x: Tensor) -> bool:
    """Whether values may be looked at: not while compiling, capturing, or without any."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or x.is_meta or capturing)


def _embedded(serving: Serving, rows: int, embeds: Tensor) -> Tensor:
    """The virtual tokens' embeddings [B, N, I]; those of token 0 where a row has fewer."""
    ids_BN = serving.prompts.ids(rows, embeds.device)
    tokens_B = serving.prompts.tables(rows, embeds.device)[2]
    exists_BN = torch.arange(ids_BN.shape[1], device=ids_BN.device) < tokens_B[:, None]
    return serving.module(ids_BN.masked_fill(~exists_BN, 0))  # type: ignore[no-any-return, operator]


def _positions(layout: Layout, position_ids: Tensor, source: Tensor) -> Tensor:
    if position_ids.ndim != 2 or source.ndim != 2:
        raise AdapterError(
            f"position_ids of shape {tuple(position_ids.shape)} cannot be extended by virtual tokens; leave them out, "
            "so that the model counts positions itself."
        )
    return layout.positions(position_ids)


def _labels_tokens(model: Any, labels: Tensor) -> bool:
    """Whether labels of the shape of the ids are one for each token of the input."""
    names = " ".join(cls.__name__ for cls in type(model).__mro__)
    whole = "SequenceClassification" in names or "MultipleChoice" in names
    return not (whole or labels.is_floating_point() or "decoder_input_ids" in model.takes)


def _known(name: str) -> bool:
    return name in ("inputs_embeds", "labels") or name.startswith(("decoder_", "encoder_"))


def _continued(cache: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a step that goes on from a cache with virtual tokens in it."""
    filled = getattr(cache, MARK, None)
    if not isinstance(filled, Filled):
        raise AdapterError(
            "past_key_values was filled without the virtual tokens of the adapters that are active now. Start from an "
            "empty cache, or use() the adapters that filled it."
        )
    inputs, layout = dict(given), filled.layout
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None:
        read = layout.spread(mask[:, : filled.user], 0, 1)
        inputs["attention_mask"] = torch.cat([read, mask[:, filled.user :]], dim=1)
    if positions is not None:
        inputs["position_ids"] = positions + layout.tokens_B[:, None].to(positions.device)
    if filled.uneven and (mask is None or positions is None):
        raise AdapterError(
            "rows with prompts of different length go on from a cache only with attention_mask and position_ids, "
            "counted as if there were no prompts. generate() sees to that by itself."
        )
    return inputs


def _copied(model: Any, given: dict[str, Any], serving: Serving) -> bool:
    """Whether an encoder-decoder copies its input ids to the decoder, as BART's classifiers do.

    Raises:
        AdapterError: it would, but its decoder has no virtual tokens.
    """
    if given.get("decoder_input_ids") is not None or given.get("decoder_inputs_embeds") is not None:
        return False
    if given.get("labels") is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return False
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not serving.everywhere and decoder.get_input_embeddings() is not serving.module:
        raise AdapterError(
            f"{type(model).__name__} without decoder_input_ids and labels copies input_ids to its decoder, where this "
            "adapter has no virtual tokens. Pass decoder_input_ids or labels."
        )
    return True


def _keep(inputs: dict[str, Any], layout: Layout, user: int) -> int | Tensor | None:
    """What the user asked for in `logits_to_keep`; asks the model for enough to serve it."""
    keep = inputs.get("logits_to_keep")
    if isinstance(keep, Tensor):
        inputs["logits_to_keep"] = 0
        return keep
    if not keep:
        return None
    inputs["logits_to_keep"] = min(keep, user) + layout.width - user
    return min(int(keep), user)


def _as_dict(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the user gets a `ModelOutput`; asks the model for one in any case."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "return_dict"):
        return True
    wanted = inputs.get("return_dict")
    inputs["return_dict"] = True
    return bool(config.return_dict if wanted is None else wanted)


def _take_back(output: Any, layout: Layout, *, ahead: bool, keep: int | Tensor | None, encoder_only: bool) -> Any:
    """The output with one column for each of the user's token ids."""

    def take(name: str, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(take(name, v) for v in x)
        if not isinstance(x, Tensor) or x.ndim < 2 or (x.ndim < 3 and name not in ("start_logits", "end_logits")):
            return x
        if name == "logits" and isinstance(keep, int):
            return layout.gather(x, ahead=ahead, last=keep)
        if x.shape[0] != layout.tokens_B.shape[0] or x.shape[1] != layout.width:
            return x
        own = layout.gather(x, ahead=ahead and name == "logits")
        return own[:, keep] if name == "logits" and isinstance(keep, Tensor) else own

    if isinstance(output, Tensor):
        return take("logits", output)
    if not hasattr(output, "items"):
        return output
    for name, value in list(output.items()):
        if not any(word in name for word in WHOLE) and (name.startswith("encoder_") or not encoder_only):
            output[name] = take(name, value)
    return output


def pad_id(model: Any) -> int:
    """The id at padding: the model's own, so that a classifier which looks for the last real token finds it."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    found = getattr(text, "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else 0


def _without_ids(model: Any, given: dict[str, Any]) -> str:
    if given.get("encoder_outputs") is not None:
        return (
            "encoder_outputs were computed without the virtual tokens of the active adapters. Pass input_ids to the "
            "model, or to generate()."
        )
    return (
        f"{type(model).__name__} was called without rows of token ids [B, T], into which the virtual tokens of the "
        "active adapters could be put. Pass input_ids or inputs_embeds."
    )


def _refuse_changed(model: Any, serving: Serving) -> None:
    """An embedding that was exchanged (`resize_token_embeddings`) would read virtual ids as its own."""
    path, module = serving.module._inlay.path, model
    for name in path.split("."):
        module = getattr(module, name, None)
    if module is not serving.module:
        raise AttachmentError(
            f"{path} is no longer the embedding that serves the virtual tokens; the model was changed after the "
            "adapter was attached. Detach, resize the embeddings, then attach again."
        )


def _refuse_packed(given: dict[str, Any], source: Tensor) -> None:
    """Several texts in one row would have one prompt, before the first of them."""
    packed = any(given.get(n) is not None for n in ("cu_seq_lens_q", "cu_seqlens", "seq_idx", "cu_seq_lens"))
    positions = given.get("position_ids")
    if _readable(source) and positions is not None and given.get("attention_mask") is None and positions.ndim == 2:
        packed = packed or bool((positions[:, 1:] < positions[:, :-1]).any())
    if packed:
        raise AdapterError(
            "several texts are packed into one row, where only the first would see the virtual tokens. Pad instead of "
            "packing, or put the virtual ids before each text yourself."
        )


def _refuse_unpadded(model: Any, uneven: bool) -> None:
    names = " ".join(cls.__name__ for cls in type(model).__mro__)
    if uneven and "SequenceClassification" in names:
        raise AdapterError(
            "with inputs_embeds a classifier cannot tell padding from text, and these rows have prompts of different "
            "length. Pass input_ids."
        )
