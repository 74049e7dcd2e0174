"""Fields are there, of the right type and not empty, or the row is an error that names the column and the value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.data.formats import Format
from inlay.data.parse import alpaca_prompt, parse
from inlay.data.rows import BadRows, Chat, Document, Labelled, Prompted, Record, RowError, Spans, Tagged, shorten
from inlay.errors import DataError

LABELLED = Format("labelled", {"text": "text", "label": "label"}, "sequence-classification")
TAGGED = Format("tagged", {"tokens": "tokens", "tags": "tags"}, "token-classification")
PROMPTED = Format("prompted", {"prompt": "prompt", "completion": "completion"}, "causal-lm")
ALPACA = Format("alpaca", {"instruction": "instruction", "output": "output", "input": "input"}, "causal-lm")
CHAT = Format("chat", {"messages": "messages", "tools": "tools"}, "causal-lm")
SPANS = Format("spans", {"question": "question", "context": "context", "answers": "answers"}, "question-answering")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": "a"}, "column 'text': 'missing'; expected a text"),
        ({"text": None, "label": "a"}, "column 'text': None; expected a text"),
        ({"text": "  ", "label": "a"}, "column 'text': '  '; expected a text that is not empty"),
        ({"text": 7, "label": "a"}, "column 'text': 7; expected a text, not int"),
        ({"text": "a\ud800", "label": "a"}, "without lone surrogates"),
        ({"text": "a"}, "column 'label': 'missing'; expected a class or a number"),
        ({"text": "a", "label": ""}, "column 'label': ''; expected a text that is not empty"),
        ({"text": "a", "label": float("nan")}, "expected a finite number"),
        ({"text": "a", "label": {}}, "expected a text, not dict"),
    ],
)
def test_bad_fields(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse(row, LABELLED)


@given(
    st.dictionaries(
        st.sampled_from(["text", "label"]), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists)
    )
)
def test_any_values_are_a_record_or_a_row_error(row: dict[str, Any]) -> None:
    try:
        record = parse(row, LABELLED)
    except RowError:
        return
    assert isinstance(record, Labelled)
    assert record.text.strip()
    assert record.label is not None


@pytest.mark.parametrize(
    ("label", "expected"), [(1, "1"), (True, "True"), (2.5, "2.5"), (" pos ", "pos"), (["a", "b", "a"], ("a", "b"))]
)
def test_labels_become_names(label: Any, expected: Any) -> None:
    assert parse({"text": "x", "label": label}, LABELLED) == Labelled("x", None, expected)


def test_labels_as_completions() -> None:
    form = Format("labelled", {"text": "text", "label": "label", "text_pair": "pair"}, "seq2seq")
    assert parse({"text": "x", "pair": "y", "label": "good"}, form) == Prompted("x\n\ny", "x\n\ny", ["good"])


def test_tags_one_per_token() -> None:
    assert parse({"tokens": ["a", "b"], "tags": ["O", 1]}, TAGGED) == Tagged(["a", "b"], ["O", "1"])
    assert parse({"tokens": '["a"]', "tags": '["O"]'}, TAGGED) == Tagged(["a"], ["O"])
    for row, words in [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tags, one per token; there are 1"),
        ({"tokens": [], "tags": []}, "a list of words"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "not empty"),
        ({"tokens": "[a", "tags": ["O"]}, "as JSON"),
    ]:
        with pytest.raises(RowError, match=words):
            parse(row, TAGGED)
    assert parse({"tokens": "to be or"}, TAGGED, targets=False) == Tagged(["to", "be", "or"], None)


def test_prompts_and_references() -> None:
    assert parse({"prompt": "p", "completion": ["a", "b"]}, PROMPTED) == Prompted("p", "p", ["a", "b"])
    assert parse({"prompt": ["one", "two"], "completion": "a"}, PROMPTED) == Prompted("one two", "one two", ["a"])
    assert parse({"prompt": "p"}, PROMPTED, targets=False) == Prompted("p", "p", [])
    with pytest.raises(RowError, match="'completion': ''"):
        parse({"prompt": "p", "completion": ""}, PROMPTED)


def test_alpaca_with_and_without_input() -> None:
    whole = parse({"instruction": "Add.", "input": "1 2", "output": "3"}, ALPACA)
    assert whole == Prompted("Add.\n\n1 2", alpaca_prompt("Add.", "1 2", ""), ["3"])
    assert parse({"instruction": "Hi.", "input": "", "output": "Ho."}, ALPACA) == Prompted(
        "Hi.", "### Instruction:\nHi.\n\n### Response:\n", ["Ho."]
    )


def test_spans_stand_where_they_say() -> None:
    row = {"question": "Who?", "context": "It was Ann.", "answers": {"text": ["Ann"], "answer_start": [7]}}
    assert parse(row, SPANS) == Spans("Who?", "It was Ann.", ["Ann"], [7])
    generative = Format("spans", SPANS.roles, "causal-lm")
    assert parse(row, generative) == Prompted("It was Ann.\n\nWho?", "It was Ann.\n\nWho?", ["Ann"])
    unanswerable = parse(row | {"answers": {"text": [], "answer_start": []}}, generative)
    assert isinstance(unanswerable, Prompted)
    assert unanswerable.references == ["unanswerable"]
    with pytest.raises(RowError, match="an answer that stands at character 6"):
        parse(row | {"answers": {"text": ["Ann"], "answer_start": [6]}}, SPANS)
    with pytest.raises(RowError, match="as many 'text' as 'answer_start'"):
        parse(row | {"answers": {"text": ["Ann"], "answer_start": []}}, SPANS)


def chat(*messages: Any, **more: Any) -> Record:
    return parse({"messages": list(messages), **more}, CHAT)


def test_conversations_of_both_spellings() -> None:
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    expected = Chat([user, assistant], [False, True], None)
    assert chat(user, assistant) == expected
    assert chat({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}) == expected
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], "name": None}
    assert chat(parts, assistant) == expected
    assert chat(user, assistant, tools='[{"name": "f"}]') == Chat([user, assistant], [False, True], [{"name": "f"}])


def test_messages_that_are_not_learned() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "no", "train": False},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    record = chat(*messages)
    assert isinstance(record, Chat)
    assert record.trained == [False, False, False, True]
    assert all("train" not in message and "weight" not in message for message in record.messages)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "Hi"}], "a message of the assistant to learn from"),
        ([{"role": "asistant", "content": "Hi"}], r"messages\[1\].*did you mean 'assistant'"),
        ([{"from": "humman", "value": "Hi"}], "did you mean 'human'"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}], "not empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text alone"),
        ([{"role": "user", "content": "a", "train": True}], "messages of the assistant alone"),
        ([{"role": "assistant", "content": "a", "train": "yes"}], "true or false"),
        (["Hi"], "a message with 'role' and 'content'"),
        ([], "a list of messages"),
    ],
)
def test_bad_conversations(messages: list[Any], words: str) -> None:
    with pytest.raises(RowError, match=words):
        chat(*messages)


def test_documents() -> None:
    assert parse({"text": "x"}, Format("document", {"text": "text"}, "causal-lm")) == Document("x")


def test_bad_rows_are_reported_together(tmp_path: Any) -> None:
    bad = BadRows("error")
    bad.add("a.csv", 3, RowError("a text", column="text", value=None))
    bad.add("a.csv", 9, RowError("2 fields", value="x" * 100))
    with pytest.raises(DataError) as raised:
        bad.raise_if_any()
    message = str(raised.value)
    assert message.startswith("2 bad rows:\n  a.csv:3: column 'text': None; expected a text\n  a.csv:9: 'xxx")
    assert "on_bad_row=skip" in message
    assert len(message) < 400


def test_reading_stops_after_twenty_bad_rows() -> None:
    bad = BadRows("error")
    for line in range(19):
        bad.add("a.csv", line, RowError("a text"))
    with pytest.raises(DataError, match="20 bad rows; reading stopped there") as raised:
        bad.add("a.csv", 19, RowError("a text"))
    assert str(raised.value).count("a.csv:") == 20


def test_skipped_rows_are_written_aside(tmp_path: Any) -> None:
    bad = BadRows("skip", tmp_path / "skipped.jsonl")
    for line in range(30):
        bad.add("a.csv", line, RowError("a text", column="text", value=7), {"text": 7})
    bad.raise_if_any()
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert bad.count == len(lines) == 30
    assert '"line": 29' in lines[-1]
    assert '"row": {"text": 7}' in lines[-1]
    with pytest.raises(DataError, match="expected 'error' or 'skip'"):
        BadRows("ignore")  # type: ignore[arg-type]


def test_values_are_shown_short() -> None:
    assert shorten("short") == "'short'"
    assert len(shorten("x" * 1000)) <= 60
