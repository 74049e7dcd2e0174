"""What an encoder yields for one row, and what the encoders share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from inlay.data.rows import Record, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = -100
"""The label of a token that is not learned."""


@dataclass(slots=True)
class Example:
    """Tokens and targets of one example.

    Attributes:
        input_ids: what the model reads.
        labels: what it learns: per token for generation and tagging (-100: nothing), the class or classes of the text
            for classification, the first and last token of the answer for spans; None where there is nothing to learn
            from. Classes and tags are numbers in the encoder's `names`.
        token_type_ids: 0 and 1 for the first and the second text, where the tokenizer tells them apart.
        prompt_ids: what the model is given to write an answer.
        references: the texts it should then write; the tags of the words; the answers of a question.
        cut: tokens that did not fit into `max_length` and are lost.
        note: something about this row worth counting in the report.
    """

    input_ids: list[int]
    labels: list[int] | None = None
    token_type_ids: list[int] | None = None
    prompt_ids: list[int] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    cut: int = 0
    note: str = ""


class Encoder(Protocol):
    """Records to examples, a batch at a time. `names` numbers the classes and tags in the order in which they came."""

    names: dict[str, int]

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]: ...


def specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    bare, whole = ids_of(tokenizer, ["a"])[0], ids_of(tokenizer, ["a"], special=True)[0]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The tokens of each text."""
    if not texts:
        return []
    return list(tokens_of(tokenizer, texts, add_special_tokens=special)["input_ids"])


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Any, pairs: Any = None, **options: Any) -> Mapping[str, Any]:
    """Call the tokenizer without padding, masks, truncation and its remark on long texts, which are counted here."""
    call: Any = tokenizer
    settings = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False} | options
    encoded: Mapping[str, Any] = call(texts, pairs, **settings) if pairs is not None else call(texts, **settings)
    return encoded
