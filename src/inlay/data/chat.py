"""Conversations as the model's chat template writes them, and which characters of them the model should learn.

Templates that mark the assistant's part (`{% generation %}`) say it themselves. For the others the conversation is
rendered again and again, each time up to a message of the assistant: without it and with the start of a turn, and with
it. The difference is what the assistant writes, *if* each rendering is a beginning of the whole. A template may break
that by rewriting the history (dropping the reasoning of earlier turns); then every turn becomes an example of its own,
in exactly the context in which the model would write it. If even that is not a beginning, the row is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.data.rows import Chat, RowError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '### System:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\\n' }}"
    "{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}{{ '\\n\\n' }}"
    "{% else %}{{ raise_exception('only system, user and assistant can be written without a chat template') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""What conversations look like for a tokenizer without chat template."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Turn:
    """A conversation as text.

    Attributes:
        text: all of it, with the template's own special tokens written out.
        spans: the characters to learn, `[(start, end), ...]` in order.
        prompt: what the model is given to write the last answer.
        reference: that answer as it stands in the data; None where the conversation ends before it.
        added: what the template puts at the start of an answer that the data has not ("<think>"), if anything.
    """

    text: str
    spans: list[tuple[int, int]]
    prompt: str
    reference: str | None
    added: str = ""


class ChatTemplate:
    """Writes conversations with the chat template of a tokenizer, or with `PLAIN_TEMPLATE` where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.plain = not getattr(tokenizer, "chat_template", None)
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._ends = tuple(sorted((token for token in tokens if token.strip()), key=len, reverse=True))

    def render(self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, *, answer: bool) -> str:
        """The text of `messages`; with `answer`, up to the point where the assistant begins to write.

        Raises:
            RowError: the template refuses the conversation.
        """
        template = PLAIN_TEMPLATE if self.plain else None
        given: Any = tools
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=given, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # templates are programs: they raise whatever they like
            roles = [message["role"] for message in messages]
            raise RowError(f"a conversation that the chat template accepts; it says: {error}", value=roles) from error
        return str(text)

    def turns(self, chat: Chat) -> list[Turn]:
        """The examples of a conversation: one, or one per answer where the template rewrites the history."""
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        wanted = [i for i in answers if chat.trained[i]]
        prompt, reference = self._last(chat, answers)
        if (marked := self._marked(chat, answers)) is not None:
            text, spans = marked
            return [
                Turn(text, [span for i, span in zip(answers, spans, strict=True) if i in wanted], prompt, reference)
            ]
        text = self.render(chat.messages, chat.tools, answer=False)
        found = [self._span(chat, i, text) for i in wanted]
        if all(found):
            spans = [span for span, _ in filter(None, found)]
            added = next((extra for _, extra in filter(None, found) if extra), "")
            return [Turn(text, spans, prompt, reference, added)]
        return [self._alone(chat, i) for i in wanted]

    def prompt(self, chat: Chat) -> str:
        """What the model is given to write the next answer; a last message of the assistant is left out."""
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return self._last(chat, answers)[0]

    def _last(self, chat: Chat, answers: list[int]) -> tuple[str, str | None]:
        messages, reference = chat.messages, None
        if answers and answers[-1] == len(messages) - 1:
            reference = str(messages[-1]["content"])
            messages = messages[:-1]
        if not messages:
            raise RowError("a conversation that someone else begins", value=[m["role"] for m in chat.messages])
        return self.render(messages, chat.tools, answer=True), reference

    def _marked(self, chat: Chat, answers: list[int]) -> tuple[str, list[tuple[int, int]]] | None:
        """The text and one span per answer where the template marks them; None where it does not."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = PLAIN_TEMPLATE if self.plain else self._tokenizer.get_chat_template(None, chat.tools)
        if not _MARKER.search(template):
            return None
        render: Any = render_jinja_template  # annotated as returning a text; returns texts and marks
        try:
            texts, marks = render(
                conversations=[chat.messages],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            roles = [message["role"] for message in chat.messages]
            raise RowError(f"a conversation that the chat template accepts; it says: {error}", value=roles) from error
        if len(marks[0]) != len(answers):
            return None
        return str(texts[0]), [self._trimmed(texts[0], int(start), int(end)) for start, end in marks[0]]

    def _span(self, chat: Chat, i: int, text: str) -> tuple[tuple[int, int], str] | None:
        """Where message `i` stands in `text`, and what the template adds to the start of an answer."""
        after = self.render(chat.messages[: i + 1], chat.tools, answer=False)
        if not text.startswith(after):
            return None
        start, added = self._start(chat, i, after)
        return self._trimmed(after, start, len(after)), added

    def _alone(self, chat: Chat, i: int) -> Turn:
        text = self.render(chat.messages[: i + 1], chat.tools, answer=False)
        start, added = self._start(chat, i, text)
        prompt = self.render(chat.messages[:i], chat.tools, answer=True)
        span = self._trimmed(text, start, len(text))
        return Turn(text, [span], prompt, str(chat.messages[i]["content"]), added)

    def _start(self, chat: Chat, i: int, after: str) -> tuple[int, str]:
        """Where the answer begins in `after`, which ends with it."""
        if i == 0:
            raise RowError("a conversation that someone else begins", value=[m["role"] for m in chat.messages])
        before = self.render(chat.messages[:i], chat.tools, answer=True)
        if after.startswith(before):
            return len(before), ""
        history = self.render(chat.messages[:i], chat.tools, answer=False)
        shared = len(os.path.commonprefix([before, after]))  # noqa: RUF071  # of texts, not of paths
        if len(history) < shared < len(before) and after.startswith(history):
            return shared, before[shared:]
        raise RowError(
            "a chat template that writes the messages before an answer as the beginning of the conversation; without"
            f" the answer it ends {shorten(before[max(shared - 10, 0) :], 80)}, with it it goes on"
            f" {shorten(after[max(shared - 10, 0) :], 80)}. Give the tokenizer a template with {{% generation %}} marks"
        )

    def _trimmed(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Without blanks after the token that ends the turn: the model has stopped by then."""
        stripped = text[start:end].rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self._ends) else (start, end)
