"""Several examples in one sequence, none of which sees another.

Packing is first fit decreasing: the longest example first, each into the first sequence with room. Positions restart
with each example. What keeps examples apart depends on the model, and getting it wrong raises nothing, so `find_layout`
runs the model once on two short texts, packed and alone, and takes the first layout whose logits agree:

* `positions`: restarted positions alone; transformers derives the mask from them (also for sliding windows).
* `flat`: the same in one row without any padding, which flash attention reads as variable-length sequences.
* `mask`: restarted positions and an explicit block-diagonal mask, for models that number positions themselves.

Legend: B sequences, T tokens, S examples in a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from inlay.data.examples import MASKED
from inlay.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Layout = Literal["positions", "flat", "mask"]
Ints = NDArray[np.int64]


def first_fit_decreasing(lengths: NDArray[np.int32] | Ints, capacity: int) -> list[Ints]:
    """Put things of these lengths into bins of `capacity`; the bins, each an array of the things' numbers.

    Things of equal length fill the bins in the order in which they are given. The number of bins depends on the
    multiset of lengths alone. Takes O(distinct lengths × bins).

    Raises:
        DataError: something is longer than a bin.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise DataError(f"an example of {int(lengths.max())} tokens does not fit into sequences of {capacity}")
    bin_of = np.zeros(len(lengths), np.int64)
    free = np.zeros(0, np.int64)
    distinct, counts = np.unique(lengths, return_counts=True)
    grouped = np.split(np.argsort(lengths, kind="stable"), np.cumsum(counts)[:-1])
    for length, things in zip(distinct[::-1], grouped[::-1], strict=False):  # np.split of nothing is one empty part
        each = capacity // max(int(length), 1)
        room = free // max(int(length), 1)
        fresh = -(-max(0, len(things) - int(room.sum())) // each)
        free = np.concatenate([free, np.full(fresh, capacity)])
        room = np.concatenate([room, np.full(fresh, each)])
        target = np.repeat(np.arange(len(free)), room)[: len(things)]
        bin_of[things] = target
        free = free - np.bincount(target, minlength=len(free)) * int(length)
    order = np.argsort(bin_of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(bin_of, minlength=len(free)))[:-1]) if len(lengths) else []


def pack(
    rows: Sequence[Sequence[dict[str, Any]]],
    *,
    pad_token_id: int,
    width: int,
    layout: Layout,
    mask_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Model inputs for sequences of examples (`input_ids` and `labels` each).

    Args:
        rows: the examples of each sequence.
        pad_token_id: fills what is left of a sequence.
        width: tokens per sequence, T; not used by the layout `flat`.
        layout: what keeps the examples apart.
        mask_dtype: dtype of the mask of the layout `mask`; fp32 where absent.

    Returns:
        `input_ids`, `labels`, `position_ids` of shape [B, T] ([1, ΣT] for `flat`) and for `mask` an additive
        `attention_mask` [B, 1, T, T]. The first token of an example is never a target.
    """
    import torch

    if layout == "flat":
        rows, width = [[example for row in rows for example in row]], 0
        width = sum(len(example["input_ids"]) for example in rows[0])
    ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    labels_BT = torch.full((len(rows), width), MASKED, dtype=torch.long)
    positions_BT = torch.zeros((len(rows), width), dtype=torch.long)
    segments_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for b, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, 1):
            end = at + len(example["input_ids"])
            ids_BT[b, at:end] = torch.tensor(example["input_ids"])
            labels_BT[b, at + 1 : end] = torch.tensor(example["labels"])[1:]
            positions_BT[b, at:end] = torch.arange(end - at)
            segments_BT[b, at:end] = number
            at = end
        positions_BT[b, at:] = torch.arange(width - at)
    inputs = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": positions_BT}
    if layout == "mask":
        inputs["attention_mask"] = _block_diagonal(segments_BT, mask_dtype or torch.float32)
    return inputs


def _block_diagonal(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T]: 0 where a token may look, the most negative number elsewhere. Padding sees padding."""
    import torch

    T = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    visible_BTT = same_BTT & torch.ones(T, T, dtype=torch.bool).tril()
    lowest = torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype).min  # finite when cast to bf16 as well
    return torch.zeros(visible_BTT.shape, dtype=dtype).masked_fill_(~visible_BTT, lowest)[:, None]


def find_layout(model: nn.Module, *, vocab_size: int | None = None, tolerance: float | None = None) -> Layout:
    """The first layout with which `model` treats packed examples exactly as alone.

    Runs the model a few times on two texts of 5 and 11 tokens, in eval mode, without gradients, and leaves its mode and
    the random state as they were. Attach adapters first: virtual tokens and prefixes are part of what is checked.

    Args:
        model: takes `input_ids` and `position_ids`, returns `logits`.
        vocab_size: tokens to draw from; the model's where absent.
        tolerance: largest difference of logits that counts as equal, relative to the largest logit; by dtype where
            absent.

    Raises:
        DataError: no layout keeps the examples apart (recurrent models, ALiBi, prompts put before the sequence).
    """
    import torch

    config: Any = getattr(model, "config", None)
    size = vocab_size or int(config.get_text_config().vocab_size)
    parameter = next(model.parameters())
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    limit = tolerance if tolerance is not None else {torch.float32: 1e-4, torch.float64: 1e-8}.get(floating, 5e-2)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, size, (length,), generator=generator).tolist() for length in (5, 11)]
    examples = [{"input_ids": text, "labels": text} for text in texts]
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    order: tuple[Layout, ...] = ("flat",) if flash else ("positions", "mask")
    was_training, seen = model.training, []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            alone = [_logits(model, {"input_ids": torch.tensor([text])}, parameter) for text in texts]
            scale = max(float(logits.abs().max()) for logits in alone)
            for layout in order:
                inputs = pack([examples], pad_token_id=0, width=16, layout=layout, mask_dtype=floating)
                inputs.pop("labels")
                try:
                    packed = _logits(model, inputs, parameter)
                except Exception as error:  # a model that takes no positions or no 4D mask says so in its own way
                    seen.append(f"{layout}: {type(error).__name__}: {error}")
                    continue
                if packed.shape[1] != 16:
                    seen.append(f"{layout}: {packed.shape[1]} positions came out for 16 tokens")
                    continue
                parts = (packed[:, :5], packed[:, 5:])
                worst = max(float((a - b).abs().max()) for a, b in zip(parts, alone, strict=True)) / max(scale, 1e-30)
                if worst <= limit:
                    return layout
                seen.append(f"{layout}: logits differ by {worst:.1e} of the largest, more than {limit:.0e}")
    finally:
        model.train(was_training)
    tried = "; ".join(seen)
    raise DataError(f"{type(model).__name__} cannot keep packed examples apart ({tried}). Train without packing.")


def _logits(model: nn.Module, inputs: dict[str, Tensor], parameter: Tensor) -> Tensor:
    logits: Tensor = model(**{k: v.to(parameter.device) for k, v in inputs.items()}, use_cache=False).logits
    return logits.float()
