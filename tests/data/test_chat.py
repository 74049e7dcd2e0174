"""The loss covers what the assistant writes and nothing else, whatever the chat template does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from inlay.data.chat import ChatTemplate
from inlay.data.rows import Chat, RowError

Make = Callable[..., PreTrainedTokenizerBase]

BEGIN = "{% for m in messages %}"
END = "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}"
MARKED = (
    BEGIN + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}" + END + PROMPT + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning stays in the last answer only, which always begins with it.
REWRITING = (
    BEGIN + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    + END
    + PROMPT
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    BEGIN + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}" + END
)
THINKING = (
    BEGIN
    + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    + END
    + PROMPT
    + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
COUNTING = "{{ messages | length }}" + THINKING
ALTERNATING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + INSTRUCT


def chat(*contents: str, untrained: tuple[int, ...] = ()) -> Chat:
    """user, assistant, user, ... with these contents."""
    messages: list[dict[str, Any]] = [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]
    return Chat(messages, [i % 2 == 1 and i not in untrained for i in range(len(messages))], None)


def learned(tokenizer: PreTrainedTokenizerBase, conversation: Chat) -> list[list[str]]:
    """Per example, the texts that are learned."""
    return [[turn.text[a:b] for a, b in turn.spans] for turn in ChatTemplate(tokenizer).turns(conversation)]


def test_chatml_without_marks(chat_tok: Make) -> None:
    (turn,) = ChatTemplate(chat_tok()).turns(chat("Hi", "Ho", "And?", "So."))
    assert [turn.text[a:b] for a, b in turn.spans] == ["Ho<|im_end|>", "So.<|im_end|>"]
    assert turn.prompt == turn.text[: turn.text.rindex("So.")]
    assert turn.reference == "So."


def test_marks_and_renderings_agree(chat_tok: Make) -> None:
    conversation = chat("Hi", "Ho", "And?", "So.", untrained=(1,))
    assert learned(chat_tok(MARKED), conversation) == learned(chat_tok(), conversation) == [["So.<|im_end|>"]]


@given(st.lists(st.text(st.sampled_from("ab \n<|>é"), min_size=1).filter(str.strip), min_size=2, max_size=5))
def test_any_contents(chat_tok: Make, contents: list[str]) -> None:
    (turn,) = ChatTemplate(chat_tok()).turns(chat(*contents))
    answers = [content for i, content in enumerate(contents) if i % 2]
    assert [turn.text[a:b] for a, b in turn.spans] == [f"{answer}<|im_end|>" for answer in answers]


def test_a_template_that_rewrites_the_history_makes_an_example_per_answer(chat_tok: Make) -> None:
    tokenizer = chat_tok(REWRITING)
    turns = ChatTemplate(tokenizer).turns(chat("Hi", "Ho", "And?", "So."))
    assert [[turn.text[a:b] for a, b in turn.spans] for turn in turns] == [
        ["<think>\n\n</think>\n\nHo<|im_end|>"],
        ["<think>\n\n</think>\n\nSo.<|im_end|>"],
    ]
    # Each in the context in which the model would write it: earlier answers without reasoning.
    assert turns[1].text.count("<think>") == 1
    assert [turn.reference for turn in turns] == ["Ho", "So."]
    assert all(turn.text.startswith(turn.prompt) for turn in turns)
    assert len(ChatTemplate(tokenizer).turns(chat("Hi", "Ho"))) == 1


def test_blanks_before_an_answer_belong_to_it(chat_tok: Make) -> None:
    assert learned(chat_tok(INSTRUCT), chat("Hi", "Ho", "And?", "So.")) == [[" Ho<|im_end|>", " So.<|im_end|>"]]


def test_what_the_template_adds_to_an_answer_is_told(chat_tok: Make) -> None:
    (turn,) = ChatTemplate(chat_tok(THINKING)).turns(chat("Hi", "Ho"))
    assert [turn.text[a:b] for a, b in turn.spans] == ["Ho<|im_end|>"]
    assert turn.added == "<think>\n"


def test_a_template_whose_renderings_do_not_continue_each_other_is_an_error(chat_tok: Make) -> None:
    with pytest.raises(RowError, match=r"without the answer it ends '1<\|im_start\|>.*generation %\} marks"):
        ChatTemplate(chat_tok(COUNTING)).turns(chat("Hi", "Ho"))


def test_what_the_template_says_is_passed_on(chat_tok: Make) -> None:
    conversation = Chat([{"role": "system", "content": "x"}, *chat("a", "b").messages], [False, False, True], None)
    with pytest.raises(RowError, match="it says: the user begins"):
        ChatTemplate(chat_tok(ALTERNATING)).turns(conversation)


def test_the_assistant_cannot_begin(chat_tok: Make) -> None:
    with pytest.raises(RowError, match="someone else begins"):
        ChatTemplate(chat_tok()).turns(Chat([{"role": "assistant", "content": "Hi"}], [True], None))


def test_tools_reach_the_template(chat_tok: Make) -> None:
    template = "{% if tools %}{{ tools[0]['name'] + '\n' }}{% endif %}" + THINKING
    conversation = Chat(chat("Hi", "Ho").messages, [False, True], [{"name": "search"}])
    (turn,) = ChatTemplate(chat_tok(template)).turns(conversation)
    assert turn.text.startswith("search\n")
    assert turn.prompt.startswith("search\n")


def test_without_template_a_plain_one_is_used(bytes_tok: PreTrainedTokenizerBase) -> None:
    (turn,) = ChatTemplate(bytes_tok).turns(chat("Hi", "Ho", "And?", "So."))
    assert turn.text == (
        "### User:\nHi\n\n### Assistant:\nHo<|endoftext|>\n\n### User:\nAnd?\n\n### Assistant:\nSo.<|endoftext|>\n\n"
    )
    assert [turn.text[a:b] for a, b in turn.spans] == ["Ho<|endoftext|>", "So.<|endoftext|>"]
    assert turn.prompt == "### User:\nHi\n\n### Assistant:\nHo<|endoftext|>\n\n### User:\nAnd?\n\n### Assistant:\n"
    with pytest.raises(RowError, match="only system, user and assistant"):
        ChatTemplate(bytes_tok).turns(
            Chat([{"role": "tool", "content": "x"}, *chat("a", "b").messages], [False, False, True], None)
        )


def test_the_next_answer_is_asked_for(chat_tok: Make) -> None:
    prompts = ChatTemplate(chat_tok())
    assert prompts.prompt(chat("Hi")).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert prompts.prompt(chat("Hi", "Ho")) == prompts.prompt(chat("Hi"))
