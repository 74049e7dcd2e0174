"""Classes, tags and spans in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from inlay.data.encode_labels import LabelledEncoder, SpansEncoder, TaggedEncoder
from inlay.data.examples import MASKED, Encoder, Example, specials
from inlay.data.rows import Labelled, Record, RowError, Spans, Tagged


def encode(encoder: Encoder, *records: Record) -> list[Example]:
    examples = []
    for found in encoder(records):
        assert isinstance(found, list), found
        examples += found
    return examples


def test_specials(pieces_tok: PreTrainedTokenizerBase, bytes_tok: PreTrainedTokenizerBase) -> None:
    assert specials(pieces_tok) == ([pieces_tok.cls_token_id], [pieces_tok.sep_token_id])
    assert specials(bytes_tok) == ([], [])


def test_texts_and_classes(pieces_tok: PreTrainedTokenizerBase) -> None:
    encoder = LabelledEncoder(pieces_tok, 60)
    good, bad, again = encode(
        encoder, Labelled("a good film", None, "good"), Labelled("bad", None, "bad"), Labelled("good", None, "good")
    )
    assert encoder.names == {"good": 0, "bad": 1}
    assert not encoder.several
    assert (good.labels, bad.labels, again.labels) == ([0], [1], [0])
    assert pieces_tok.decode(good.input_ids) == "[CLS] a good film [SEP]"
    assert good.token_type_ids is None
    assert good.references == ["good"]


def test_pairs_have_token_types(pieces_tok: PreTrainedTokenizerBase) -> None:
    (example,) = encode(LabelledEncoder(pieces_tok, 60), Labelled("a film", "the sea", "x"))
    assert pieces_tok.decode(example.input_ids) == "[CLS] a film [SEP] the sea [SEP]"
    assert example.token_type_ids == [0] * 4 + [1] * 3


def test_of_two_texts_the_longer_loses_its_end(pieces_tok: PreTrainedTokenizerBase) -> None:
    (example,) = encode(LabelledEncoder(pieces_tok, 7), Labelled("the fox", "the dog and the sea and the day", "x"))
    assert pieces_tok.decode(example.input_ids) == "[CLS] the fox [SEP] the dog [SEP]"
    assert example.cut == 6
    assert len(example.token_type_ids or []) == 7


def test_several_classes(pieces_tok: PreTrainedTokenizerBase) -> None:
    encoder = LabelledEncoder(pieces_tok, 60)
    first, none = encode(encoder, Labelled("a", None, ("x", "y")), Labelled("b", None, ()))
    assert encoder.several
    assert first.labels == [0, 1]
    assert none.labels == []


@given(st.lists(st.sampled_from(["fox", "lazy", "Smith", "2020!", "😀", "é", "\u200b", "X1"]), min_size=1, max_size=6))
def test_every_word_has_its_tag_once(
    pieces_tok: PreTrainedTokenizerBase, bytes_tok: PreTrainedTokenizerBase, words: list[str]
) -> None:
    tags = [f"T{i}" for i in range(len(words))]
    for tokenizer in (pieces_tok, bytes_tok):
        encoder = TaggedEncoder(tokenizer, 60)
        (example,) = encode(encoder, Tagged(words, tags))
        names = list(encoder.names)
        assert [names[label] for label in example.labels or [] if label != MASKED] == tags
        assert len(example.labels or []) == len(example.input_ids)
        assert example.references == tags


def test_words_are_tokenized_as_in_a_text(
    pieces_tok: PreTrainedTokenizerBase, bytes_tok: PreTrainedTokenizerBase, words_tok: PreTrainedTokenizerBase
) -> None:
    words = ["the", "quick", "dog", "and", "sea"]
    for tokenizer in (pieces_tok, bytes_tok, words_tok):
        (example,) = encode(TaggedEncoder(tokenizer, 60), Tagged(words, None))
        assert example.input_ids == tokenizer(" ".join(words))["input_ids"]


def test_a_sentence_too_long_keeps_its_first_tags(pieces_tok: PreTrainedTokenizerBase) -> None:
    words = ["the", "quick", "brown", "fox"]
    (example,) = encode(TaggedEncoder(pieces_tok, 4), Tagged(words, ["A", "B", "C", "D"]))
    assert pieces_tok.decode(example.input_ids) == "[CLS] the quick [SEP]"
    assert example.references == ["A", "B"]
    assert example.cut > 0


def test_spans_are_tokens(pieces_tok: PreTrainedTokenizerBase) -> None:
    context = "John Smith went to New York with Ann"
    row = Spans("the user ?", context, ["New York"], [context.index("New York")])
    (example,) = encode(SpansEncoder(pieces_tok, 60), row)
    start, end = example.labels or []
    assert pieces_tok.decode(example.input_ids[start : end + 1]) == "new york"
    (none,) = encode(SpansEncoder(pieces_tok, 60), Spans("the user ?", context, [], []))
    assert none.labels == [0, 0]
    assert none.references == [""]


@pytest.mark.parametrize(
    ("max_length", "words"), [(12, "within the first 12 tokens"), (4, "leaves room in max_length=4")]
)
def test_an_answer_that_is_cut_away_is_an_error(
    pieces_tok: PreTrainedTokenizerBase, max_length: int, words: str
) -> None:
    context = "John Smith went to New York with Ann"
    (found,) = SpansEncoder(pieces_tok, max_length)([Spans("the user ?", context, ["Ann"], [context.index("Ann")])])
    assert isinstance(found, RowError)
    assert words in str(found)
