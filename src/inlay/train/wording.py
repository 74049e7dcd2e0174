"""Classification through a language model: the template that texts are put into, and the words that are classes.

Also the words that prompts and prefixes start from. Everything that a run needs a tokenizer for, and a method has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from inlay.config import RunConfig
from inlay.data.encode_template import Wording
from inlay.errors import ConfigError, MethodError
from inlay.methods.base import Method, Mix
from inlay.methods.p_tuning import PTuning
from inlay.methods.prompt import Prompt
from inlay.template import Template
from inlay.verbalizer import Verbalizer

MASK = "{mask}"
"""What stands in a template for the tokenizer's own mask token."""


def wording_of(config: RunConfig, kind: str, tokenizer: Any, model_config: Any) -> Wording | None:
    """How the run puts its texts to the model; None where the model has a head for the classes.

    Raises:
        ConfigError: the template has no place for the answer, or the model writes texts of its own.
    """
    if config.template is None:
        return None
    if kind == "encoder-decoder":
        raise ConfigError("template: an encoder-decoder writes its answer; give prompt and completion, task: seq2seq")
    mask, source = tokenizer.mask_token, config.template
    if kind == "decoder" and MASK in source:
        raise ConfigError(f"template: {MASK} is for masked language models; a decoder answers behind the template")
    if kind == "encoder":
        if mask is None:
            raise ConfigError(f"template: the tokenizer of {config.model} has no mask token, where an answer could go")
        source = source.replace(MASK, mask)
        if source.count(mask) != 1:
            raise ConfigError(
                f"template: {source.count(mask)} places for the answer in {config.template!r}; write {MASK} once"
            )
    return Wording(source, int(model_config.get_text_config().vocab_size), goes_on=kind == "decoder")


def words_of(config: RunConfig, tokenizer: Any, labels: Sequence[str] | None) -> Verbalizer | None:
    """The words that stand for the classes, in the order of their numbers.

    Raises:
        ConfigError: a class without a word, a word without a class, or one that the model would write otherwise.
        DataError: a word that is not one token.
    """
    if config.verbalizer is None:
        return None
    missing = [label for label in labels or () if label not in config.verbalizer]
    extra = [label for label in config.verbalizer if label not in (labels or ())]
    if missing or extra:
        said = [f"no words for {missing}"] * bool(missing) + [f"words for {extra}, which no row has"] * bool(extra)
        raise ConfigError(f"verbalizer: {' and '.join(said)}; the classes are {list(labels or ())}")
    verbalizer = Verbalizer({label: config.verbalizer[label] for label in labels or ()}, tokenizer)
    source = (config.template or "").replace(MASK, tokenizer.mask_token or MASK)
    before, masked, _ = source.partition(tokenizer.mask_token or MASK)
    if not masked:  # a causal model, which reads the last token
        verbalizer.mask_id = None
    _check_blanks(config, tokenizer, bool(before) and before[-1].isspace() == bool(masked))
    return verbalizer


def _check_blanks(config: RunConfig, tokenizer: Any, expected: bool) -> None:
    """A word after a blank is another token than the same word without it, where the vocabulary keeps blanks."""
    for label, given in (config.verbalizer or {}).items():
        for word in [given] if isinstance(given, str) else given:
            other = f" {word}" if not word.startswith(" ") else word.lstrip()
            two = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (word, other)]
            if two[0] != two[1] and word.startswith(" ") != expected:
                raise ConfigError(
                    f"verbalizer: {label}: in the template the answer stands {'after' if expected else 'without'} a "
                    f"blank, and this tokenizer keeps blanks: write {other!r} instead of {word!r}"
                )


def check_vocabulary(wording: Wording, model: Any) -> None:
    """Refuse a template with virtual tokens whose ids would be rows of the model's own embedding, or none at all.

    Raises:
        ConfigError: the embedding has more or fewer rows than the model's configuration says.
    """
    rows = model.get_input_embeddings().num_embeddings
    if rows != wording.first and Template(wording.template, bare=True).length:
        raise ConfigError(f"template: the model's embedding has {rows} rows, its config.json says {wording.first}")


def told(verbalizer: Verbalizer, tokenizer: Any) -> str:
    """Each class with the tokens that stand for it."""
    words = [" or ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids)))) for ids in verbalizer.ids]
    return ", ".join(f"{label} = {tokens}" for label, tokens in zip(verbalizer.labels, words, strict=True))


def virtual_tokens(method: Method, wording: Wording | None) -> int:
    """How many virtual tokens the method puts into each row by itself; those of a wording are in the rows already."""
    kinds = (Prompt, PTuning) if wording is None else (Prompt,)
    return sum(part.length for part in method.parts if isinstance(part, kinds))


def without_virtual_tokens(wording: Wording) -> Wording:
    """The same words for the model alone."""
    return replace(wording, template=re.sub(r"\{prompt:\d+\}\s*", "", wording.template).strip())


def fitted(method: Method, config: RunConfig, wording: Wording | None, tokenizer: Any, labels: Sequence[str]) -> Method:
    """The method with what the configuration says of its words: template of P-tuning, start of a prompt.

    Raises:
        ConfigError: virtual tokens in the template that no part of the method trains, or the other way round; words to
            start from that the method has no use for.
    """
    kinds = {type(part) for part in method.parts}
    if config.init_classes and Prompt not in kinds:
        raise ConfigError("init_classes: only the method prompt starts from the names of the classes")
    if wording is not None and Template(wording.template, bare=True).length and PTuning not in kinds:
        raise ConfigError(f"template: its virtual tokens are trained by the method ptuning, not by {method!r}")
    if isinstance(method, Mix):
        return Mix(methods=tuple(_part(part, config, wording, tokenizer, labels) for part in method.methods))
    return _part(method, config, wording, tokenizer, labels)


def _part(part: Method, config: RunConfig, wording: Wording | None, tokenizer: Any, labels: Sequence[str]) -> Method:
    if isinstance(part, PTuning) and wording is not None:
        if "template" in part.model_fields_set and part.template != config.template:
            raise ConfigError("method.template: template says another one; keep the latter")
        if not Template(wording.template, bare=True).length:
            raise ConfigError("template: PTuning trains virtual tokens; write {prompt:3} where 3 of them should stand")
        return part.model_copy(update={"template": wording.template, "places": None})
    if not isinstance(part, Prompt) or not (config.init_text or config.init_classes):
        return part

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if config.init_classes:
        start: Mapping[str, Any] = {"init": "classes", "class_ids": [ids(name) for name in labels]}
    else:
        start = {"init": "text", "text_ids": ids(config.init_text or "")}
    try:
        return Prompt(**(part.model_dump() | dict(start)))
    except MethodError as error:
        key = "init_classes" if config.init_classes else "init_text"
        raise ConfigError(f"{key}: {str(error).removeprefix('Prompt: ')}") from None


def start_from_words(adapter: Any, config: RunConfig, tokenizer: Any) -> float | None:
    """Set prefixes to the activations of `init_text`; returns the error that remains, None where there is no prefix.

    Raises:
        ConfigError: the method has neither prompt nor prefix.
    """
    from inlay.methods.prefix import PrefixKV
    from inlay.prefix_words import init_prefix_from_words

    if config.init_text is None:
        return None
    if any(isinstance(module, PrefixKV) for piece in adapter.pieces.values() for module in piece.modules()):
        return init_prefix_from_words(adapter, tokenizer(config.init_text, add_special_tokens=False)["input_ids"])
    if not any(isinstance(part, Prompt) for part in adapter.method.parts):
        raise ConfigError("init_text: only prompts and prefixes start from words")
    return None
