"""Columns decide the format; two readings are an error that shows the way out."""

from __future__ import annotations

from typing import Any

import pytest

from inlay.data.formats import Format, checked_task, detect
from inlay.errors import DataError


def found(columns: str, model_kind: Any = "decoder", **options: Any) -> Format:
    values = options.pop("values", {})
    names = columns.split()
    return detect(names, [dict.fromkeys(names, "x") | values], where="a.csv", model_kind=model_kind, **options)


LISTS = {"tokens": ["a"], "tags": ["O"], "ner_tags": ["O"], "pos_tags": ["N"]}


@pytest.mark.parametrize(
    ("columns", "values", "model_kind", "expected"),
    [
        ("text label", {}, "encoder", "text and label (text=text, label=label) for sequence-classification"),
        ("text category", {}, "decoder", "text and label (text=text, label=category) for sequence-classification"),
        (
            "title text label",
            {},
            "encoder",
            "text=text, label=label) for sequence-classification; columns not used: title",
        ),
        (
            "sentence1 sentence2 label idx",
            {},
            "encoder",
            "text pair and label (text=sentence1, label=label, text_pair=sentence2)",
        ),
        ("premise hypothesis label", {}, "encoder", "(text=premise, label=label, text_pair=hypothesis)"),
        ("question passage answer", {"answer": True}, "encoder", "(text=question, label=answer, text_pair=passage)"),
        ("text_a text_b label", {}, "encoder", "(text=text_a, label=label, text_pair=text_b)"),
        ("mr ref", {}, "decoder", "prompt and completion (prompt=mr, completion=ref) for causal-lm"),
        ("MR ref", {}, "encoder-decoder", "(prompt=MR, completion=ref) for seq2seq"),
        ("question answer", {}, "decoder", "(prompt=question, completion=answer) for causal-lm"),
        ("source target id", {"source": ["a"]}, "encoder-decoder", "(prompt=source, completion=target) for seq2seq"),
        (
            "instruction input output",
            {},
            "decoder",
            "(instruction=instruction, output=output, input=input) for causal-lm",
        ),
        (
            "messages tools",
            {"messages": [{}]},
            "decoder",
            "conversations (messages=messages, tools=tools) for causal-lm",
        ),
        ("conversations", {"conversations": [{}]}, "decoder", "conversations (messages=conversations)"),
        (
            "id tokens ner_tags",
            LISTS,
            "encoder",
            "words and tags (tokens=tokens, tags=ner_tags) for token-classification",
        ),
        ("context question answers", {"answers": {}}, "encoder", "for question-answering"),
        ("context question answers", {"answers": {}}, "decoder", "for causal-lm"),
        ("text", {}, "decoder", "plain text (text=text) for causal-lm"),
        ("text summary", {}, "decoder", "(prompt=text, completion=summary) for causal-lm"),
    ],
)
def test_detection(columns: str, values: dict[str, Any], model_kind: str, expected: str) -> None:
    assert expected in str(found(columns, model_kind, values=values))


@pytest.mark.parametrize(
    ("columns", "values", "ways"),
    [
        ("question answer category", {}, ["text=question,label=category", "prompt=question,completion=answer"]),
        ("text category intent", {}, ["text=text,label=category", "text=text,label=intent"]),
        ("tokens ner_tags pos_tags", LISTS, ["tokens=tokens,tags=ner_tags", "tokens=tokens,tags=pos_tags"]),
    ],
)
def test_two_readings_are_an_error_that_shows_both(columns: str, values: dict[str, Any], ways: list[str]) -> None:
    with pytest.raises(DataError, match="can be read in 2 ways") as raised:
        found(columns, values=values)
    for way in ways:
        assert f"--columns {way}" in str(raised.value)
        mapping = dict(pair.split("=") for pair in way.split(","))
        chosen = found(columns, values=values, mapping=mapping)
        assert chosen.roles == mapping


def test_the_task_chooses_between_readings() -> None:
    assert found("question answer category", task="causal_lm").kind == "prompted"
    assert found("question answer category", task="sequence-classification").kind == "labelled"
    assert found("question answer category", "encoder").kind == "labelled"


def test_a_label_is_a_completion_where_a_task_writes() -> None:
    form = found("text label", "encoder-decoder", task="seq2seq")
    assert (form.kind, form.task) == ("labelled", "seq2seq")


def test_columns_are_named_by_role() -> None:
    form = found("a b", mapping={"prompt": "a", "completion": "b"})
    assert form.roles == {"prompt": "a", "completion": "b"}
    assert found("text kind", mapping={"label": "kind"}).roles == {"text": "text", "label": "kind"}
    assert found("x y z", mapping={"text_a": "x", "text_b": "y", "label": "z"}).multi_text


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ("a b", {}, "fit no known form.*prompt=COLUMN,completion=COLUMN"),
        ("a b", {"mapping": {"prompt": "a", "completion": "c"}}, r"has no column 'c'"),
        ("a b", {"mapping": {"promt": "a"}}, "did you mean 'prompt'"),
        ("chosen rejected prompt", {}, "preference pairs"),
        ("question answer", {"model_kind": "encoder"}, "an encoder cannot learn from"),
        ("text", {"model_kind": "encoder"}, "text=COLUMN,label=COLUMN"),
        ("text", {"task": "clasification"}, "task is 'clasification'"),
        ("text label", {"task": "seq2seq"}, "a decoder learns it as causal-lm"),
        (
            "prompt completion",
            {"task": "causal-lm", "model_kind": "encoder"},
            "needs a decoder, and the model is an encoder",
        ),
    ],
)
def test_what_cannot_be(columns: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        found(columns, **options)


def test_rows_to_predict_for_need_no_targets() -> None:
    options: dict[str, Any] = {"targets": False, "model_kind": None}
    assert found("text", task="sequence-classification", **options).kind == "labelled"
    assert found("prompt", task="causal-lm", **options).kind == "prompted"
    assert found("tokens", task="token-classification", **options).kind == "tagged"
    assert found("text", task="token-classification", **options).roles == {"tokens": "text"}
    trained = {"prompt": "mr", "completion": "ref"}
    assert found("mr", task="causal-lm", mapping=trained, **options).roles == {"prompt": "mr"}


def test_tasks_may_be_written_with_underscores() -> None:
    assert checked_task("token_classification", "encoder") == "token-classification"
    assert checked_task(None, "encoder") is None
