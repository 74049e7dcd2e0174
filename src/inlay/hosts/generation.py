"""`generate` with virtual tokens.

The loop of transformers indexes logits by token id, so virtual ids may not stand in its sequences: it runs with an
ordinary id in their place, and the model's forward pass puts them in when it reads the prompt. What looks at the text
(logits processors, stopping criteria, streamers) sees the user's ids alone, and so does the user in the end. In an
encoder-decoder the loop knows nothing of the encoder's ids, and nothing of this is needed.

Legend: B rows of the user, T columns of the user, P columns with the virtual tokens in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from inlay.errors import AdapterError
from inlay.hosts.embedding import Serving
from inlay.hosts.layout import Layout
from inlay.hosts.prompted import MARK, Filled, extend, pad_id

CACHES = ("past_key_values", "cache_params", "state", "mems")


@dataclass(eq=False)
class Job:
    """One call of `generate`.

    Attributes:
        text_BT: the user's ids, None where they passed embeddings.
        ids_BP: the same with the virtual ids in, None where there are none or they are in the encoder.
        layout: where the virtual tokens stand.
        mask_BT: which of the user's columns are text.
        seen: how many of the P columns the model has read into its cache.
    """

    text_BT: Tensor | None = None
    ids_BP: Tensor | None = None
    layout: Layout | None = None
    mask_BT: Tensor | None = None
    seen: int = 0

    @property
    def added(self) -> int:
        """How many columns the loop's sequences have that the user's do not."""
        if self.ids_BP is None or self.text_BT is None:
            return 0
        return self.ids_BP.shape[1] - self.text_BT.shape[1]

    def text(self, sequences: Tensor) -> Tensor:
        """Sequences of the loop as the user knows them; beams and samples of one row follow one another."""
        if self.ids_BP is None or self.text_BT is None:
            return sequences
        text = _repeat(self.text_BT, sequences.shape[0]).to(sequences.device)
        return torch.cat([text, sequences[:, self.ids_BP.shape[1] :]], dim=1)

    def read(self, given: dict[str, Any]) -> bool:
        """Puts the virtual ids into the inputs of one step; whether there were any."""
        ids = given.get("input_ids")
        if self.ids_BP is None or ids is None:
            return self.ids_BP is None
        whole = ids.shape[1] >= self.ids_BP.shape[1]
        cached = given.get("use_cache") is not False and any(given.get(name) is not None for name in CACHES)
        start = self.seen if cached or not whole else 0
        part = self.ids_BP[:, start : start + ids.shape[1]]
        if not part.shape[1]:
            return False
        given["input_ids"] = torch.cat([_repeat(part, ids.shape[0]).to(ids.device), ids[:, part.shape[1] :]], dim=1)
        self.seen = start + part.shape[1]
        return True


def _repeat(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else x.repeat_interleave(rows // x.shape[0], 0)


def run(model: Any, base: Callable[..., Any], given: dict[str, Any], serving: Serving) -> Any:
    """What `generate` gives for the user's inputs, with the virtual tokens of each row at work.

    Args:
        model: the hosted model.
        base: its own `generate`.
        given: all arguments by name.
        serving: the virtual tokens.

    Raises:
        AdapterError: something was asked for that cannot be done with virtual tokens.
    """
    _refuse(model, given)
    given = dict(given)
    decodes = "decoder_input_ids" in model.takes
    inputs = given.pop("inputs", None)
    if inputs is not None:
        if given.get("input_ids") is not None:
            raise AdapterError("generate() was given both inputs and input_ids. Pass one of them.")
        given["input_ids"] = inputs
    if given.get("input_ids") is None and given.get("inputs_embeds") is None and not decodes:
        given["input_ids"] = _begin(model, given)
    if given.get("attention_mask") is None and given.get("input_ids") is not None:
        given["attention_mask"] = _mask(model, given)
    extended = extend(model, given, serving, left=not decodes)
    text, inputs = given.get("input_ids"), extended.inputs
    if decodes or text is None:
        job = Job(text, None, extended.layout)
    else:
        ids_BP: Tensor = inputs["input_ids"]
        job = Job(text, ids_BP, extended.layout, given.get("attention_mask"), _past(given, serving))
        inputs["input_ids"] = ids_BP.masked_fill(ids_BP >= serving.prompts.first, _safe_id(model, serving))
        _lengthen(model, inputs, job.added)
        if given.get("streamer") is not None:
            inputs["streamer"] = TextStream(given["streamer"], job)
    model.__dict__["_inlay_job"] = job
    result = base(**inputs)
    if isinstance(result, Tensor):
        return result if decodes else job.text(result)
    return _result(result, job, decodes, extended.user, extended.uneven, inputs)


def _result(result: Any, job: Job, decodes: bool, user: int, uneven: bool, inputs: dict[str, Any]) -> Any:
    if not decodes:
        result.sequences = job.text(result.sequences)
    hidden = "encoder_hidden_states" if decodes else "hidden_states"
    steps = getattr(result, hidden, None)
    layout = job.layout
    if steps is not None and layout is not None:

        def own(x: Tensor) -> Tensor:
            return layout.gather(x) if x.shape[:2] == (layout.tokens_B.shape[0], layout.width) else x

        if decodes:
            setattr(result, hidden, tuple(own(x) for x in steps))
        else:
            result.hidden_states = (tuple(own(x) for x in steps[0]), *steps[1:])
    cache = getattr(result, "past_key_values", None)
    if cache is not None and layout is not None and not decodes:
        setattr(cache, MARK, Filled(layout, user, uneven, inputs.get("attention_mask")))
    return result


class TextProcessors(LogitsProcessorList):
    """Logits processors that see the user's ids and what was generated, not the stand-ins for virtual tokens."""

    job: Job

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """The processed scores."""
        return super().__call__(self.job.text(input_ids), scores, **kwargs)  # type: ignore[arg-type]


class TextCriteria(StoppingCriteriaList):
    """Stopping criteria that see the same; but the limit of the length counts all columns of the loop."""

    job: Job

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which sequences are finished."""
        text = self.job.text(input_ids)
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self:
            seen = input_ids if isinstance(criterion, MaxLengthCriteria) else text
            done = done | criterion(seen, scores, **kwargs)
        return done


class TextStream(BaseStreamer):
    """Streams the user's ids first, then what is generated."""

    def __init__(self, streamer: Any, job: Job) -> None:
        self._streamer, self._job, self._started = streamer, job, False

    def put(self, value: Tensor) -> None:
        """The prompt, then one token after another."""
        self._streamer.put(value if self._started else self._job.text(value))
        self._started = True

    def end(self) -> None:
        """The end of the sequence."""
        self._streamer.end()


def text_processors(job: Job, make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The logits processors of a call, made as if there were no virtual tokens."""
    if job.layout is None or job.text_BT is None:
        return make(*args, **kwargs)
    bound = inspect.signature(make).bind_partial(*args, **kwargs).arguments
    bound |= bound.pop("kwargs", {})
    if bound.get("encoder_input_ids") is not None:
        bound["encoder_input_ids"] = job.text_BT
    if job.ids_BP is None:
        return make(**bound)
    config = copy.copy(bound["generation_config"])
    config.max_length -= job.added
    if config.min_new_tokens is not None:
        config.min_length -= job.added
    bound |= {"generation_config": config, "input_ids_seq_length": job.text_BT.shape[1]}
    # Where the text of each row begins is read from the mask: columns before it are not looked at.
    around = dict(bound.get("model_kwargs") or {})
    lengthened = around.get("attention_mask")
    if isinstance(lengthened, Tensor) and lengthened.ndim == 2 and job.mask_BT is not None and job.mask_BT.ndim == 2:
        around["attention_mask"] = _repeat(job.mask_BT, len(lengthened)).to(lengthened.device)
        bound["model_kwargs"] = around
    processors = TextProcessors(make(**bound))
    processors.job = job
    return processors


def text_criteria(job: Job, made: Any) -> Any:
    """The stopping criteria of a call."""
    if job.ids_BP is None:
        return made
    criteria = TextCriteria(made)
    criteria.job = job
    return criteria


def _setting(model: Any, given: dict[str, Any], name: str) -> Any:
    """A generation setting, from the call, its `generation_config`, or the model's own."""
    for source in (given.get(name), getattr(given.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def _one(value: Any) -> int | None:
    if isinstance(value, Tensor):
        value = value.reshape(-1).tolist()
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return int(value) if value is not None else None


def _begin(model: Any, given: dict[str, Any]) -> Tensor:
    start = _one(_setting(model, given, "bos_token_id"))
    if start is None:
        raise AdapterError("generate() was given no input_ids, and the model has no bos_token_id to begin with.")
    return torch.full((1, 1), start, dtype=torch.long, device=model.device)


def _mask(model: Any, given: dict[str, Any]) -> Tensor:
    """The mask that `generate` would infer: padding where the id is the pad token and that is not the end token."""
    ids, pad = given["input_ids"], _one(_setting(model, given, "pad_token_id"))
    ends = _setting(model, given, "eos_token_id")
    ends = ends if isinstance(ends, list | tuple) else [_one(ends)]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ids.ne(pad).long()  # type: ignore[no-any-return]


def _safe_id(model: Any, serving: Serving) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        found = _one(getattr(model.generation_config, name, None))
        if found is not None and 0 <= found < serving.prompts.first:
            return found
    return pad_id(model)


def _past(given: dict[str, Any], serving: Serving) -> int:
    """How much of the prompt a given cache holds already."""
    cache = given.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    if past and not isinstance(getattr(cache, MARK, None), Filled):
        raise AdapterError(
            "past_key_values was filled without the virtual tokens of the adapters that are active now. Start from an "
            "empty cache, or use() the adapters that filled it."
        )
    if past and serving.prompts.trailing:
        raise AdapterError(
            "virtual tokens behind the text move when the text goes on, so a cache cannot be used again. Pass the "
            "whole text without past_key_values."
        )
    return past


def _lengthen(model: Any, inputs: dict[str, Any], added: int) -> None:
    """A maximum that counts the prompt also has to count the virtual tokens."""
    longest = _setting(model, inputs, "max_length")
    if longest is None or _setting(model, inputs, "max_new_tokens") is not None:
        return
    config: Any = inputs.get("generation_config")
    if inputs.get("max_length") is None and getattr(config, "max_length", None) is not None:
        inputs["generation_config"] = config = copy.deepcopy(config)
        config.max_length = longest + added
    else:
        inputs["max_length"] = longest + added


def _refuse(model: Any, given: dict[str, Any]) -> None:
    """No virtual tokens where `generate` runs the model on other rows than those given, or rewrites the prompt."""
    guidance = _setting(model, given, "guidance_scale")
    wrong = {
        "guidance_scale": guidance is not None and guidance != 1,
        "token_healing": bool(_setting(model, given, "token_healing")),
        "custom_generate": given.get("custom_generate") is not None,
        "cache_implementation='paged'": _setting(model, given, "cache_implementation") == "paged",
        "input_ids and inputs_embeds": given.get("input_ids") is not None and given.get("inputs_embeds") is not None,
    }
    found = [name for name, bad in wrong.items() if bad]
    if found:
        raise AdapterError(f"generate() with {found[0]} does not work while adapters with virtual tokens are active.")
