"""Records with text to be written into tokens: what decoders and encoder-decoders learn from.

Only what the model should write is learned; the prompt has the label -100. The first token has it always, because
nothing predicts it. A text that is too long loses its end, and the row is an error when nothing to learn is left.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inlay.data.chat import ChatTemplate, Turn
from inlay.data.examples import MASKED, Example, ids_of, specials, tokens_of
from inlay.data.rows import Chat, Document, Prompted, Record, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITTEN = "conversations made into one example per answer, because the template rewrites the history"
PROMPT_OF_DOCUMENT = 32
"""Most tokens of running text that are given as a prompt for a sample."""


def plain_prompt(prompt: str) -> str:
    """A prompt for a tokenizer without chat template: followed by a newline, unless it ends with a blank already."""
    return prompt if prompt[-1:].isspace() else f"{prompt}\n"


class CausalEncoder:
    """One sequence: prompt, then answer and end token; a conversation; or a window of running text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, targets: bool = True, one_each: bool = False
    ) -> None:
        """Args: `targets`: there is something to learn; `one_each`: a row makes one example, or is an error."""
        self.names: dict[str, int] = {}
        self._tokenizer, self._max_length = tokenizer, max_length
        self._targets, self._one_each = targets, one_each
        self._chat = ChatTemplate(tokenizer)
        self._before, after = specials(tokenizer)
        self._end = after or ([tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else [])

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]:
        if records and isinstance(records[0], Document):
            texts = [record.text for record in records if isinstance(record, Document)]
            pairs = zip(records, ids_of(self._tokenizer, texts), strict=True)
            return [self._windows(record, ids) for record, ids in pairs if isinstance(record, Document)]
        if self._chat.plain and not any(isinstance(record, Chat) for record in records):
            return self._plain([record for record in records if isinstance(record, Prompted)])
        return self._conversations([as_chat(record) for record in records])

    def _windows(self, document: Document, ids: list[int]) -> list[Example] | RowError:
        """Windows that overlap by one token, so that every token but the first is predicted exactly once."""
        ids = (self._before if document.first else []) + ids + (self._end if document.last else [])
        if len(ids) < 2:
            return RowError("a text of two tokens or more", value=document.text)
        step = self._max_length - 1
        starts = range(0, 1 if self._one_each else len(ids) - 1, step)
        examples = []
        for start in starts:
            window = ids[start : start + self._max_length]
            prompt = window[: max(1, min(PROMPT_OF_DOCUMENT, len(window) // 4))]
            examples.append(Example(window, [MASKED, *window[1:]], prompt_ids=prompt))
        if self._one_each:
            examples[0].cut = max(0, len(ids) - self._max_length)
        return examples

    def _plain(self, records: Sequence[Prompted]) -> list[list[Example] | RowError]:
        prompts = [plain_prompt(record.plain) for record in records]
        prompt_ids = ids_of(self._tokenizer, prompts)
        if not self._targets:
            return [
                [Example(self._before + ids, prompt_ids=self._before + ids, references=record.references)]
                for record, ids in zip(records, prompt_ids, strict=True)
            ]
        answers = [record.references[0] for record in records]
        joined = ids_of(self._tokenizer, [p + a for p, a in zip(prompts, answers, strict=True)])
        merged = [i for i, ids in enumerate(joined) if ids[: len(prompt_ids[i])] != prompt_ids[i]]
        notes = dict.fromkeys(merged, "")
        for i, ways in zip(merged, self._apart([answers[i] for i in merged]), strict=True):
            apart = next((way for way in ways if self._same_text(prompt_ids[i] + way, joined[i])), None)
            if apart is None:
                notes[i] = "answers whose first letters share a token with the prompt, which is not learned"
            else:
                joined[i] = prompt_ids[i] + apart
        results: list[list[Example] | RowError] = []
        for i, record in enumerate(records):
            learned = len(self._before) + min(len(prompt_ids[i]), len(joined[i]))
            ids, prompt = self._before + joined[i] + self._end, self._before + prompt_ids[i]
            labels = [MASKED] * learned + ids[learned:]
            fitted = self._fit(Example(ids, labels, None, prompt, record.references, 0, notes.get(i, "")))
            results.append(fitted if isinstance(fitted, RowError) else [fitted])
        return results

    def _apart(self, answers: Sequence[str]) -> list[list[list[int]]]:
        """Answers tokenized apart from their prompts, as they are in generation: alone, and behind a special token.

        Behind a special token, vocabularies that put a blank before the first word of a text do not.
        """
        alone = ids_of(self._tokenizer, answers)
        anchor, number = self._tokenizer.eos_token, self._tokenizer.eos_token_id
        if not isinstance(anchor, str):
            return [[ids] for ids in alone]
        behind = ids_of(self._tokenizer, [anchor + answer for answer in answers])
        return [[one, two[1:]] if two[:1] == [number] else [one] for one, two in zip(alone, behind, strict=True)]

    def _same_text(self, one: list[int], other: list[int]) -> bool:
        texts = [self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (one, other)]
        return texts[0] == texts[1]

    def _conversations(self, chats: Sequence[Chat]) -> list[list[Example] | RowError]:
        written: list[list[Turn] | RowError] = []
        for chat in chats:
            try:
                prompt_only = [] if self._targets else [Turn("", [], self._chat.prompt(chat), None)]
                written.append(prompt_only or self._chat.turns(chat))
            except RowError as error:
                written.append(error)
        flat = [turn for turns in written if isinstance(turns, list) for turn in turns]
        encoded = iter(self._examples_of(flat))
        results: list[list[Example] | RowError] = []
        for turns in written:
            if isinstance(turns, RowError):
                results.append(turns)
                continue
            found = [next(encoded) for _ in turns]
            errors = [one for one in found if isinstance(one, RowError)]
            if self._one_each and len(turns) > 1:
                errors.append(RowError("a conversation that makes one example, when streaming", value=len(turns)))
            results.append(errors[0] if errors else [one for one in found if isinstance(one, Example)])
            if len(turns) > 1 and not errors:
                for one in found:
                    if isinstance(one, Example):
                        one.note = one.note or REWRITTEN
        return results

    def _examples_of(self, turns: Sequence[Turn]) -> list[Example | RowError]:
        before = self._before if self._chat.plain else []  # a template writes special tokens itself
        prompts = ids_of(self._tokenizer, [turn.prompt for turn in turns])
        learned = self._learned(turns) if self._targets else [([], []) for _ in turns]
        examples: list[Example | RowError] = []
        for turn, prompt, (ids, labels) in zip(turns, prompts, learned, strict=True):
            references = [turn.reference] if turn.reference is not None else []
            if not self._targets:
                examples.append(Example(before + prompt, prompt_ids=before + prompt, references=references))
                continue
            note = f"answers without the {turn.added!r} that the chat template begins them with" if turn.added else ""
            labels = [MASKED] * len(before) + labels
            examples.append(self._fit(Example(before + ids, labels, None, before + prompt, references, 0, note)))
        return examples

    def _learned(self, turns: Sequence[Turn]) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of texts of which some characters are learned."""
        if not turns:
            return []
        encoded = tokens_of(
            self._tokenizer, [turn.text for turn in turns], add_special_tokens=False, return_offsets_mapping=True
        )
        results = []
        for turn, ids, offsets in zip(turns, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            labels = [MASKED] * len(ids)
            starts = [start for start, _ in offsets]
            for begin, end in turn.spans:
                first, stop = bisect_left(starts, begin), bisect_left(starts, end)
                # A token that takes a blank before the answer with it belongs to the answer.
                if first and offsets[first - 1][1] > begin and not turn.text[starts[first - 1] : begin].strip():
                    first -= 1
                labels[first:stop] = ids[first:stop]
            results.append((list(ids), labels))
        return results

    def _fit(self, example: Example) -> Example | RowError:
        """Cut to `max_length`; an error where nothing to learn is left."""
        length, labels = len(example.input_ids), example.labels or []
        if labels:
            labels[0] = MASKED
        example.cut = max(0, length - self._max_length)
        example.input_ids, example.labels = example.input_ids[: self._max_length], labels[: self._max_length]
        if all(label == MASKED for label in example.labels):
            first = next((i for i, label in enumerate(labels) if label != MASKED), length)
            return RowError(
                f"something to learn within max_length={self._max_length} tokens (raise it, or shorten the prompt); the"
                f" answer begins at token {first + 1} of {length}"
            )
        return example


class Seq2SeqEncoder:
    """A source for the encoder and a target for the decoder; each loses its end beyond `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, targets: bool = True) -> None:
        self.names: dict[str, int] = {}
        self._tokenizer, self._max_length, self._targets = tokenizer, max_length, targets

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]:
        pairs = [self._pairs(record) for record in records]
        flat = [pair for each in pairs for pair in each]
        sources = iter(ids_of(self._tokenizer, [source for source, _ in flat], special=True))
        targets = iter(self._targets_of([references[0] for _, references in flat]) if self._targets else [])
        results: list[list[Example] | RowError] = []
        for each in pairs:
            examples = []
            for _, references in each:
                ids, labels = next(sources), next(targets) if self._targets else None
                short, fewer = self._cut(ids), self._cut(labels) if labels is not None else None
                cut = len(ids) - len(short) + (len(labels) - len(fewer) if labels and fewer else 0)
                note = "conversations made into one example per answer" if len(each) > 1 else ""
                examples.append(Example(short, fewer, None, short, references, cut, note))
            results.append(examples)
        return results

    def _targets_of(self, texts: list[str]) -> list[list[int]]:
        encoded = tokens_of(self._tokenizer, None, text_target=texts) if texts else {"input_ids": []}
        return [list(ids) for ids in encoded["input_ids"]]

    def _cut(self, ids: list[int]) -> list[int]:
        """The first tokens, and the one that ends the sequence."""
        return ids if len(ids) <= self._max_length else [*ids[: self._max_length - 1], ids[-1]]

    def _pairs(self, record: Record) -> list[tuple[str, list[str]]]:
        if isinstance(record, Prompted):
            source = f"{record.system}\n\n{record.prompt}" if record.system else record.prompt
            return [(source, record.references)]
        if not isinstance(record, Chat):
            return []
        answers = (
            [i for i, trained in enumerate(record.trained) if trained] if self._targets else [len(record.messages)]
        )
        return [
            (
                "\n\n".join(_said(message, alone=i == 1) for message in record.messages[:i]),
                [str(record.messages[i]["content"])] if self._targets else [],
            )
            for i in answers
        ]


def _said(message: dict[str, str], *, alone: bool) -> str:
    return message["content"] if alone else f"{message['role']}: {message['content']}"


def as_chat(record: Record) -> Chat:
    """A prompt and its answer as a conversation."""
    if isinstance(record, Chat):
        return record
    if not isinstance(record, Prompted):
        raise TypeError(f"{type(record).__name__} is no conversation")
    messages = [{"role": "system", "content": record.system}] if record.system else []
    messages.append({"role": "user", "content": record.prompt})
    if record.references:
        messages.append({"role": "assistant", "content": record.references[0]})
    return Chat(messages, [message["role"] == "assistant" for message in messages], None)
