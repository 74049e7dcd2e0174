"""Records with classes, tags and answer spans into tokens: what encoders (and models with a head) learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inlay.data.examples import MASKED, Example, ids_of, specials, tokens_of
from inlay.data.rows import Labelled, Record, RowError, Spans, Tagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabelledEncoder:
    """One or two texts and a class. A text that is too long loses its end; of two, the longer one does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.names: dict[str, int] = {}
        self.several = False
        """Whether a row had a list of classes."""
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]:
        rows = [record for record in records if isinstance(record, Labelled)]
        paired = bool(rows) and rows[0].pair is not None
        firsts = [row.text for row in rows]
        seconds = [row.pair or "" for row in rows] if paired else None
        encoded = tokens_of(self._tokenizer, firsts, seconds)
        ids: list[list[int]] = list(encoded["input_ids"])
        types: Any = encoded.get("token_type_ids") if paired else None
        examples: list[list[Example] | RowError] = []
        for i, row in enumerate(rows):
            example = Example(ids[i], token_type_ids=list(types[i]) if types else None)
            if len(ids[i]) > self._max_length:
                short = tokens_of(
                    self._tokenizer, row.text, row.pair, truncation="longest_first", max_length=self._max_length
                )
                example = Example(list(short["input_ids"]), cut=len(ids[i]) - len(short["input_ids"]))
                if types:
                    example.token_type_ids = list(short["token_type_ids"])
            if row.label is not None:
                labels = (row.label,) if isinstance(row.label, str) else row.label
                self.several |= not isinstance(row.label, str)
                example.labels = [self.names.setdefault(label, len(self.names)) for label in labels]
                example.references = list(labels)
            examples.append([example])
        return examples


class TaggedEncoder:
    """Words and tags. The first token of a word carries its tag, the others none; a sentence too long loses its end.

    Words are tokenized one by one, so that no token spans two of them, with a blank before where the vocabulary tells
    words at the start from words in a text. A word of which the tokenizer leaves nothing is its unknown token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.names: dict[str, int] = {}
        self._tokenizer, self._max_length = tokenizer, max_length
        self._before, self._after = specials(tokenizer)
        first, second, both = ids_of(tokenizer, ["x", "y", "x y"])
        self._blank = "" if first + second == both else " "
        self._unknown = next((i for i in (tokenizer.unk_token_id, tokenizer.eos_token_id) if isinstance(i, int)), None)

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]:
        rows = [record for record in records if isinstance(record, Tagged)]
        words = [f"{self._blank}{word}" if i else word for row in rows for i, word in enumerate(row.tokens)]
        pieces = iter(tokens_of(self._tokenizer, words, add_special_tokens=False)["input_ids"])
        return [self._encode(row, [list(next(pieces)) for _ in row.tokens]) for row in rows]

    def _encode(self, row: Tagged, pieces: list[list[int]]) -> list[Example] | RowError:
        if self._unknown is None and not all(pieces):
            word = row.tokens[[bool(piece) for piece in pieces].index(False)]
            return RowError("words of which the tokenizer leaves something", value=word)
        unknown = [] if self._unknown is None else [self._unknown]
        empty = sum(not piece for piece in pieces)
        tags = row.tags or [""] * len(row.tokens)
        ids, labels = list(self._before), [MASKED] * len(self._before)
        for piece, tag in zip(pieces, tags, strict=True):
            ids += piece or unknown
            # Without tags, 0 marks where a word begins.
            labels.append(self.names.setdefault(tag, len(self.names)) if row.tags else 0)
            labels += [MASKED] * (len(piece) - 1)
        room = self._max_length - len(self._after)
        cut = max(0, len(ids) - room)
        ids, labels = ids[:room] + self._after, labels[:room] + [MASKED] * len(self._after)
        kept = sum(label != MASKED for label in labels)
        note = "words unknown to the tokenizer down to the last character" if empty else ""
        return [Example(ids, labels, references=tags[:kept] if row.tags else [], cut=cut, note=note)]


class SpansEncoder:
    """A question and its context; the labels are the first and the last token of the first answer, or [0, 0] for none.

    A context that is too long loses its end. Where that loses the answer the row is an error, because it would teach
    that there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.names: dict[str, int] = {}
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]:
        return [self._encode(record) for record in records if isinstance(record, Spans)]

    def _encode(self, row: Spans) -> list[Example] | RowError:
        whole = tokens_of(self._tokenizer, row.question, row.context, return_offsets_mapping=True)
        encoded = whole
        if len(whole["input_ids"]) > self._max_length:
            try:
                encoded = tokens_of(
                    self._tokenizer,
                    row.question,
                    row.context,
                    return_offsets_mapping=True,
                    truncation="only_second",
                    max_length=self._max_length,
                )
            except Exception as error:  # the question alone does not fit
                return RowError(
                    f"a question that leaves room in max_length={self._max_length} ({error})", value=row.question
                )
        ids = list(encoded["input_ids"])
        example = Example(ids, cut=len(whole["input_ids"]) - len(ids))
        if types := encoded.get("token_type_ids"):
            example.token_type_ids = list(types)
        if row.answers is None:
            return [example]
        example.labels, example.references = [0, 0], row.answers or [""]
        if row.answers:
            begin, stop = row.starts[0], row.starts[0] + len(row.answers[0])
            whole_encoding: Any = encoded
            texts, offsets = whole_encoding.sequence_ids(0), encoded["offset_mapping"]
            inside = [
                (i, end)
                for i, (text, (start, end)) in enumerate(zip(texts, offsets, strict=True))
                if text == 1 and end > begin and start < stop
            ]
            if not inside or inside[-1][1] < stop:
                return RowError(
                    f"an answer within the first {self._max_length} tokens (max_length) of question and context",
                    value=row.answers[0],
                )
            example.labels = [inside[0][0], inside[-1][0]]
        return [example]
