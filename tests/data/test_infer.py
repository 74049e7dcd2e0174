"""Rows to predict for: files or values, without targets, read as in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from inlay.data import Batches, prepare_infer
from inlay.errors import DataError

Write = Callable[[str, Any], Path]
Make = Callable[..., PreTrainedTokenizerBase]


def texts(encoded: Any, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return [tokenizer.decode(encoded.prompt_ids(i)) for i in range(len(encoded))]


def test_texts_and_pairs_to_classify(pieces_tok: PreTrainedTokenizerBase) -> None:
    encoded, words = prepare_infer(["a film", "the sea"], pieces_tok, "sequence-classification", labels=["x", "y"])
    assert texts(encoded, pieces_tok) == ["[CLS] a film [SEP]", "[CLS] the sea [SEP]"]
    assert words == "text and label (text=text) for sequence-classification"
    assert encoded.origin(1) == "rows:2"
    assert "labels" not in encoded[0]
    pairs, _ = prepare_infer([("a film", "the sea")], pieces_tok, "sequence_classification")
    assert pairs[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    (batch,) = Batches(
        encoded, 8, seed=0, shuffle=False, pad_token_id=0, task="sequence-classification", group_by_length=False
    ).epoch(0)
    assert batch.targets == 0
    assert "labels" not in batch.inputs
    assert batch.indices == [0, 1]


def test_files_with_or_without_labels(write: Write, pieces_tok: PreTrainedTokenizerBase) -> None:
    bare = write("a.txt", "a film\n\nthe sea\n")
    encoded, _ = prepare_infer(bare, pieces_tok, "sequence-classification")
    assert [encoded.origin(i) for i in range(2)] == ["a.txt:1", "a.txt:3"]
    labelled = write("a.csv", "title,kind\na film,y\n")
    columns = {"text": "title", "label": "kind"}
    encoded, _ = prepare_infer(labelled, pieces_tok, "sequence-classification", columns=columns, labels=["x", "y"])
    assert encoded[0]["labels"] == 1
    assert encoded.reference(0) == ["y"]
    unlabelled = write("b.csv", "title\na film\n")
    encoded, _ = prepare_infer(unlabelled, pieces_tok, "sequence-classification", columns=columns, labels=["x", "y"])
    assert len(encoded) == 1
    with pytest.raises(DataError, match=r"label 'y', which the model does not know \(known: x\)"):
        prepare_infer(labelled, pieces_tok, "sequence-classification", columns=columns, labels=["x"])


def test_words_to_tag(pieces_tok: PreTrainedTokenizerBase) -> None:
    for rows in (["the lazy fox"], [["the", "lazy", "fox"]], [{"tokens": ["the", "lazy", "fox"]}]):
        encoded, _ = prepare_infer(rows, pieces_tok, "token-classification")
        assert pieces_tok.decode(encoded[0]["input_ids"]) == "[CLS] the lazy fox [SEP]"
        assert sum(label != -100 for label in encoded[0]["labels"]) == 3  # where words begin
        assert not encoded.labelled
    tagged, _ = prepare_infer(
        [{"tokens": ["the", "fox"], "tags": ["O", "X"]}], pieces_tok, "token-classification", labels=["O", "X"]
    )
    assert tagged.labelled
    assert [label for label in tagged[0]["labels"] if label != -100] == [0, 1]


def test_several_classes(pieces_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "a film", "labels": ["y", "x"]}, {"text": "the sea", "labels": []}]
    encoded, _ = prepare_infer(rows, pieces_tok, "sequence-classification", labels=["x", "y", "z"], multi_label=True)
    assert encoded.labelled
    assert [row["labels"] for row in encoded] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    bare, _ = prepare_infer(["a film"], pieces_tok, "sequence-classification", labels=["x", "y"], multi_label=True)
    assert bare.labels.several
    assert not bare.labelled


def test_prompts_and_conversations(write: Write, bytes_tok: PreTrainedTokenizerBase, chat_tok: Make) -> None:
    encoded, _ = prepare_infer(["the fox"], bytes_tok, "causal-lm")
    assert texts(encoded, bytes_tok) == ["the fox\n"]
    encoded, _ = prepare_infer(["the fox"], chat_tok(), "causal-lm")
    assert texts(encoded, chat_tok()) == ["<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"]
    messages = [[{"role": "user", "content": "Hi"}]]
    encoded, _ = prepare_infer(messages, chat_tok(), "causal-lm")
    assert texts(encoded, chat_tok()) == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
    path = write("a.jsonl", json.dumps({"mr": "name[x]", "ref": "x"}) + "\n")
    encoded, _ = prepare_infer(path, bytes_tok, "causal-lm", columns={"prompt": "mr", "completion": "ref"})
    assert texts(encoded, bytes_tok) == ["name[x]\n"]
    assert encoded.reference(0) == ["x"]


def test_a_text_is_what_the_user_of_the_training_rows_says(chat_tok: Make, bytes_tok: PreTrainedTokenizerBase) -> None:
    tok = chat_tok()
    said, _ = prepare_infer(["2+2?"], tok, "causal-lm", columns={"messages": "conversations"})
    meant, _ = prepare_infer(
        [[{"role": "user", "content": "2+2?"}]], tok, "causal-lm", columns={"messages": "messages"}
    )
    assert said.prompt_ids(0) == meant.prompt_ids(0)
    asked = {"instruction": "task", "output": "answer"}
    short, _ = prepare_infer(["Add."], bytes_tok, "causal-lm", columns=asked)
    whole, _ = prepare_infer([{"task": "Add.", "answer": "4"}], bytes_tok, "causal-lm", columns=asked)
    assert short.prompt_ids(0) == whole.prompt_ids(0)


def test_a_prompt_keeps_its_length(bytes_tok: PreTrainedTokenizerBase) -> None:
    encoded, _ = prepare_infer(["the quick brown fox"], bytes_tok, "causal-lm", max_length=4)
    assert texts(encoded, bytes_tok) == ["the quick brown fox\n"]


def test_sources_for_an_encoder_decoder(pieces_tok: PreTrainedTokenizerBase) -> None:
    encoded, _ = prepare_infer([{"source": "the fox"}], pieces_tok, "seq2seq")
    assert texts(encoded, pieces_tok) == ["[CLS] the fox [SEP]"]
    assert "labels" not in encoded[0]


def test_questions(pieces_tok: PreTrainedTokenizerBase) -> None:
    encoded, _ = prepare_infer([("the user ?", "it is John")], pieces_tok, "question-answering")
    assert pieces_tok.decode(encoded[0]["input_ids"], skip_special_tokens=True).endswith("it is john")
    assert "start_positions" not in encoded[0]
    answers = {"text": ["John"], "answer_start": [6]}
    row = {"question": "the user ?", "context": "it is John", "answers": answers}
    encoded, _ = prepare_infer([row], pieces_tok, "question-answering")
    assert encoded.labelled
    assert encoded.reference(0) == ["John"]


def test_bad_rows(write: Write, tmp_path: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="rows:2: column 'text': ''"):
        prepare_infer(["a", ""], pieces_tok, "sequence-classification")
    with pytest.raises(DataError, match="needs a file to write the skipped rows to"):
        prepare_infer(["a"], pieces_tok, "sequence-classification", on_bad_row="skip")
    aside = tmp_path / "skipped.jsonl"
    encoded, _ = prepare_infer(["a", ""], pieces_tok, "sequence-classification", on_bad_row="skip", skipped_file=aside)
    assert len(encoded) == 1
    assert json.loads(aside.read_text())["line"] == 2
    with pytest.raises(DataError, match="holds no rows"):
        prepare_infer([], pieces_tok, "sequence-classification")
