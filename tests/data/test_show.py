"""What is shown is what the model sees, and what is marked is what it learns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from inlay.data import DataSpec, prepare
from inlay.data.show import length_figure, length_table, show_row
from inlay.data.spec import Prepared

Write = Callable[[str, Any], Path]


def prepared_of(write: Write, rows: list[Any], tokenizer: Any, kind: Any, **options: Any) -> Prepared:
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(str(path), cache_dir=path.parent / "cache", eval_fraction=0, **options)
    return prepare(spec, tokenizer, kind)


def test_the_answer_is_marked(write: Write, bytes_tok: PreTrainedTokenizerBase) -> None:
    prepared = prepared_of(write, [{"prompt": "the é fox", "completion": "jumps 😀"}], bytes_tok, "decoder")
    text = show_row(prepared.train, 0, bytes_tok, marks=True)
    first, *rest = text.plain.split("\n")
    assert first.startswith("a.jsonl:1  ")
    assert first.endswith("learned")
    assert "\n".join(rest) == "the é fox\n⟦jumps 😀<|endoftext|>⟧"
    coloured = show_row(prepared.train, 0, bytes_tok)
    (green,) = [span for span in coloured.spans if span.style == "bold green"]
    assert coloured.plain[green.start : green.end] == "jumps 😀<|endoftext|>"


def test_every_answer_of_a_conversation_is_marked(
    write: Write, chat_tok: Callable[..., PreTrainedTokenizerBase]
) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "So"},
        {"role": "assistant", "content": "Yes", "train": False},
    ]
    prepared = prepared_of(write, [{"messages": messages}], chat_tok(), "decoder")
    shown = show_row(prepared.train, 0, chat_tok(), marks=True).plain
    assert shown.count("⟦") == 1
    assert "assistant\n⟦Ho<|im_end|>⟧\n<|im_start|>user\nSo" in shown


def test_classes_tags_and_spans(write: Write, pieces_tok: PreTrainedTokenizerBase) -> None:
    classes = prepared_of(write, [{"text": "a film", "label": c} for c in "xy"], pieces_tok, "encoder")
    assert show_row(classes.train, 1, pieces_tok, marks=True).plain.endswith("[CLS] a film [SEP]\n-> ⟦y⟧")
    tags = prepared_of(write, [{"tokens": ["john", "went"], "tags": ["B-per", "O"]}], pieces_tok, "encoder")
    assert show_row(tags.train, 0, pieces_tok, marks=True).plain.endswith("\njohn⟦/B-per⟧ went ")
    row = {"question": "the user ?", "context": "it is John", "answers": {"text": ["John"], "answer_start": [6]}}
    spans = prepared_of(write, [row], pieces_tok, "encoder")
    assert "⟦ john⟧ [SEP]" in show_row(spans.train, 0, pieces_tok, marks=True).plain
    pairs = prepared_of(write, [{"source": "the fox", "target": "jumps"}], pieces_tok, "encoder-decoder")
    assert "the fox [SEP]\n-> ⟦[CLS] jumps [SEP]⟧" in show_row(pairs.train, 0, pieces_tok, marks=True).plain


def test_lengths_as_table_and_picture(write: Write, tmp_path: Path, bytes_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "the fox", "completion": "dog " * (1 + i)} for i in range(20)]
    prepared = prepared_of(write, rows, bytes_tok, "decoder", max_length=24)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(length_table(prepared))
    line = next(line for line in console.export_text().splitlines() if "train" in line)
    assert line.split()[1:3] == ["20", f"{int(prepared.train.lengths.sum())}"]
    assert line.split()[-1] == "24"
    picture = length_figure(prepared, tmp_path / "plots" / "lengths.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
