"""Texts that a model writes: for samples while training, for metrics at the end, and for `inlay generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from inlay.data.batches import pad_prompts
from inlay.errors import DataError


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen. Without `sample` the result is the same every time."""

    max_new_tokens: int = 64
    num_beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `model.generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.sample:
            return chosen | {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch: int = 16,
    autocast: Callable[[], AbstractContextManager[Any]],
    stopped: Callable[[], bool] | None = None,
) -> Iterator[tuple[int, str]]:
    """Pairs (index of the prompt, text), batch by batch, prompts of similar length together.

    Args:
        model: with the adapter active, in eval mode.
        tokenizer: decodes what the model wrote; special tokens are dropped.
        prompts: token ids of each prompt.
        decoding: how tokens are chosen.
        batch: prompts at a time.
        autocast: the precision of the forward passes.
        stopped: asked before each token whether to end here; what is then yielded is unfinished.

    Raises:
        DataError: a prompt that leaves no room for an answer.
    """
    room = _positions(model)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index + 1} is empty: the model needs at least one token to go on from")
        if room is not None and len(prompt) >= room:
            raise DataError(f"prompt {index + 1} has {len(prompt)} tokens; the model has {room} positions")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    device = next(model.parameters()).device
    writes_after = not model.config.is_encoder_decoder
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        # A decoder goes on from the last token, so its padding stands on the left.
        inputs = pad_prompts([prompts[i] for i in chosen], tokenizer.pad_token_id, left=writes_after, device=device)
        longest = inputs["input_ids"].shape[1]
        settings = decoding.settings()
        if room is not None and writes_after:
            settings["max_new_tokens"] = min(decoding.max_new_tokens, room - longest)
        with torch.no_grad(), autocast():
            if stopped is not None:
                settings["stopping_criteria"] = _stopping(stopped)
            written = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **settings)
        for row, i in enumerate(chosen):
            answer = written[row, longest:] if writes_after else written[row]
            yield i, tokenizer.decode(answer, skip_special_tokens=True).strip()


def _stopping(stopped: Callable[[], bool]) -> Any:
    """The same question in the form that `model.generate` asks it, for all rows at once."""
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList(
        [lambda ids_BT, scores, **_: torch.full((len(ids_BT),), stopped(), device=ids_BT.device)]
    )


def _positions(model: Any) -> int | None:
    """Most tokens of a sequence, where the model has such a limit."""
    if model.config.is_encoder_decoder:
        return None
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
