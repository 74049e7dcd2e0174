"""Which tokens are learned, for prompts, conversations, running text, and sources with targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from inlay.data.encode_text import CausalEncoder, Seq2SeqEncoder, plain_prompt
from inlay.data.examples import MASKED, Example
from inlay.data.rows import Chat, Document, Prompted, Record, RowError

Make = Callable[..., PreTrainedTokenizerBase]
text = st.text(st.sampled_from("ab e\n.é€😀"), min_size=1, max_size=20).filter(str.strip)


def encode(tokenizer: PreTrainedTokenizerBase, record: Record, max_length: int = 200, **options: Any) -> list[Example]:
    (found,) = CausalEncoder(tokenizer, max_length, **options)([record])
    assert isinstance(found, list), found
    return found


def prompted(prompt: str, *references: str) -> Prompted:
    return Prompted(prompt, prompt, list(references))


def answer_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode([label for label in example.labels or [] if label != MASKED]))


def well_formed(example: Example) -> None:
    """Labels are the tokens themselves or masked, the first always is, and something is learned."""
    assert example.labels is not None
    assert len(example.labels) == len(example.input_ids)
    assert all(label in (MASKED, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    assert example.labels[0] == MASKED
    assert any(label != MASKED for label in example.labels)


@given(text, text)
def test_only_the_answer_and_the_end_are_learned(bytes_tok: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    (example,) = encode(bytes_tok, prompted(prompt, answer))
    well_formed(example)
    assert answer_of(bytes_tok, example) == answer + "<|endoftext|>"
    assert bytes_tok.decode(example.input_ids) == plain_prompt(prompt) + answer + "<|endoftext|>"
    # What generation starts from is exactly what stood before the answer in training.
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids
    assert example.labels is not None
    assert all(label == MASKED for label in example.labels[: len(example.prompt_ids)])
    assert all(label != MASKED for label in example.labels[len(example.prompt_ids) :])


def test_a_prompt_is_followed_by_a_newline_unless_it_ends_with_a_blank() -> None:
    assert [plain_prompt(p) for p in ("a", "a\n", "a: ")] == ["a\n", "a\n", "a: "]


def test_a_vocabulary_with_blanks_before_words(words_tok: PreTrainedTokenizerBase) -> None:
    (example,) = encode(words_tok, prompted("the quick brown", "fox and dog"))
    well_formed(example)
    assert example.input_ids[0] == words_tok.bos_token_id
    assert answer_of(words_tok, example) == "fox and dog</s>"
    assert example.prompt_ids[0] == words_tok.bos_token_id
    assert example.note == ""


def test_a_token_across_the_border_is_split_there(chat_tok: Make) -> None:
    tokenizer = chat_tok("")  # an empty template is none
    tokenizer.add_tokens(["\nxyz"])
    (example,) = encode(tokenizer, prompted("prompt", "xyz"))
    well_formed(example)
    assert tokenizer.convert_tokens_to_ids("\nxyz") not in example.input_ids
    assert answer_of(tokenizer, example).startswith("xyz")
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


def test_the_chat_template_is_used_where_there_is_one(chat_tok: Make) -> None:
    tokenizer = chat_tok()
    record = Prompted("Hi", "unused", ["Ho", "Hey"], "Be brief")
    (example,) = encode(tokenizer, record)
    well_formed(example)
    assert tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )
    assert answer_of(tokenizer, example) == "Ho<|im_end|>"
    assert tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")


@given(st.lists(text, min_size=2, max_size=6), st.sets(st.integers(0, 5)))
def test_learned_tokens_of_a_conversation_spell_its_trained_answers(
    chat_tok: Make, contents: list[str], untrained: set[int]
) -> None:
    tokenizer = chat_tok()
    messages: list[dict[str, Any]] = [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]
    trained = [i % 2 == 1 and i not in untrained for i in range(len(messages))]
    (found,) = CausalEncoder(tokenizer, 500)([Chat(messages, trained, None)])
    if not any(trained):
        assert isinstance(found, RowError)
        return
    assert isinstance(found, list)
    (example,) = found
    well_formed(example)
    assert answer_of(tokenizer, example) == "".join(
        f"{content}<|im_end|>" for content, learn in zip(contents, trained, strict=True) if learn
    )


@given(st.text(st.sampled_from("ab e\n"), min_size=4, max_size=120).filter(str.strip), st.integers(2, 16))
def test_windows_predict_every_token_once(bytes_tok: PreTrainedTokenizerBase, content: str, max_length: int) -> None:
    examples = encode(bytes_tok, Document(content), max_length)
    whole = [*bytes_tok(content)["input_ids"], bytes_tok.eos_token_id]
    predicted = [label for example in examples for label in (example.labels or []) if label != MASKED]
    assert predicted == whole[1:]
    for example in examples:
        well_formed(example)
        assert 2 <= len(example.input_ids) <= max_length
        assert example.cut == 0


def test_only_the_ends_of_a_document_are_marked(words_tok: PreTrainedTokenizerBase) -> None:
    bos, eos = words_tok.bos_token_id, words_tok.eos_token_id
    middle = encode(words_tok, Document("the dog and the fox", first=False, last=False))[0].input_ids
    whole = encode(words_tok, Document("the dog and the fox"))[0].input_ids
    assert bos not in middle
    assert eos not in middle
    assert whole == [bos, *middle, eos]


def test_a_cut_answer_is_counted_and_one_cut_away_is_an_error(bytes_tok: PreTrainedTokenizerBase) -> None:
    prompt = "the quick brown fox"
    (whole,) = encode(bytes_tok, prompted(prompt, "jumps over the lazy dog"))
    before = len(whole.prompt_ids)
    (cut,) = encode(bytes_tok, prompted(prompt, "jumps over the lazy dog"), before + 2)
    assert len(cut.input_ids) == before + 2
    assert cut.cut == len(whole.input_ids) - before - 2
    (error,) = CausalEncoder(bytes_tok, before)([prompted(prompt, "jumps over the lazy dog")])
    assert isinstance(error, RowError)
    assert f"answer begins at token {before + 1} of {len(whole.input_ids)}" in str(error)


def test_to_generate_only_the_prompt_is_encoded(bytes_tok: PreTrainedTokenizerBase, chat_tok: Make) -> None:
    (plain,) = encode(bytes_tok, prompted("the fox", "jumps"), targets=False)
    assert bytes_tok.decode(plain.prompt_ids) == "the fox\n"
    assert plain.labels is None
    assert plain.references == ["jumps"]
    (chat,) = encode(chat_tok(), prompted("the fox"), targets=False)
    assert chat_tok().decode(chat.prompt_ids).endswith("the fox<|im_end|>\n<|im_start|>assistant\n")


def test_batches_are_encoded_as_rows_are(bytes_tok: PreTrainedTokenizerBase) -> None:
    records = [prompted("one", "two"), prompted("three\n", "\nfour"), prompted("five", "five")]
    together = CausalEncoder(bytes_tok, 100)(records)
    assert together == [CausalEncoder(bytes_tok, 100)([record])[0] for record in records]


def test_sources_and_targets(pieces_tok: PreTrainedTokenizerBase) -> None:
    (found,) = Seq2SeqEncoder(pieces_tok, 60)([prompted("the quick fox", "jumps over", "leaps")])
    assert isinstance(found, list)
    (example,) = found
    assert pieces_tok.decode(example.input_ids) == "[CLS] the quick fox [SEP]"
    assert pieces_tok.decode(example.labels or []) == "[CLS] jumps over [SEP]"
    assert example.references == ["jumps over", "leaps"]
    (found,) = Seq2SeqEncoder(pieces_tok, 4)([prompted("the quick fox", "jumps over")])
    assert isinstance(found, list)
    assert found[0].input_ids[-1] == pieces_tok.sep_token_id
    assert len(found[0].input_ids) == 4
    assert found[0].cut == len(example.input_ids) - 4 + len(example.labels or []) - len(found[0].labels or [])


def test_a_conversation_makes_a_target_of_every_answer(pieces_tok: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (found,) = Seq2SeqEncoder(pieces_tok, 60)([Chat(messages, [False, True, False, True], None)])
    assert isinstance(found, list)
    assert [pieces_tok.decode(example.labels or [], skip_special_tokens=True) for example in found] == ["two", "four"]
    assert pieces_tok.decode(found[0].input_ids, skip_special_tokens=True) == "one"
    assert pieces_tok.decode(found[1].input_ids, skip_special_tokens=True) == "user one assistant two user three"


@pytest.mark.parametrize("content", ["", " "])
def test_a_document_of_nothing_is_an_error(words_tok: PreTrainedTokenizerBase, content: str) -> None:
    (found,) = CausalEncoder(words_tok, 10)([Document(content, first=False, last=False)])
    assert isinstance(found, RowError)


def test_an_answer_that_does_not_fit_spoils_its_own_conversation_only(chat_tok: Make) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + (':' if m['role'] == 'user' or loop.last else ':~') + m['content'] }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )

    def conversation(first: str) -> Chat:
        contents = ("one", first, "two", "three")
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return Chat(messages, [False, True, False, True], None)

    encoder = CausalEncoder(chat_tok(template), 40)
    bad, good = encoder([conversation("fox " * 60), conversation("fox")])
    assert isinstance(bad, RowError)
    assert good == CausalEncoder(chat_tok(template), 40)([conversation("fox")])[0]
    assert isinstance(good, list)
    assert [answer_of(chat_tok(), example) for example in good] == ["fox<|im_end|>", "three<|im_end|>"]
