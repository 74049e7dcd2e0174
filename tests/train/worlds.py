"""Model folders and data files small enough to train in a test: the label follows from one word of the text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny import VOCAB, tiny

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
COLOURS = ["red", "green", "blue"]
THINGS = ["cat", "dog", "bird", "fish", "tree", "house", "river", "stone"]
OTHERS = ["the", "a", "is", "on", "in", "near", "and", "paris", "london", "anna", "peter", ":", "."]


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words of the sentences below; ids that fit the special tokens of the tiny configurations."""
    ordered = SPECIAL + COLOURS + THINGS + OTHERS
    if family == "t5":  # pad 0, eos 2
        ordered[1], ordered[2] = "[CLS]", "[SEP]"
    vocabulary = {word: index for index, word in enumerate(ordered)}
    assert len(vocabulary) < VOCAB
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    shape = {"bert": "[CLS] $A [SEP]", "t5": "$A [SEP]"}.get(family, "[CLS] $A")
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1" if family == "bert" else f"{shape} $B"
    base.post_processor = processors.TemplateProcessing(
        single=shape, pair=pair, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=48,
    )


def model_folder(path: Path, family: str, task: Any = None) -> Path:
    """A saved tiny model with its tokenizer."""
    tiny(family, task).save_pretrained(path)
    tokenizer(family).save_pretrained(path)
    return path


def sentence(choose: random.Random) -> tuple[str, str]:
    """A text and its colour."""
    colour = choose.choice(COLOURS)
    words = [choose.choice(["the", "a"]), colour, choose.choice(THINGS), "is", choose.choice(["on", "in", "near"])]
    words += (
        ["the", choose.choice(THINGS)] if choose.random() < 0.7 else ["a", choose.choice(THINGS), "and", "a", "tree"]
    )
    return " ".join(words), colour


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one form."""
    choose = random.Random(seed)
    out: list[dict[str, Any]] = []
    for _ in range(count):
        text, colour = sentence(choose)
        if kind == "labelled":
            out.append({"text": text, "label": colour})
        elif kind == "numbers":
            out.append({"text": text, "label": float(COLOURS.index(colour)) + 0.5})
        elif kind == "tagged":
            words = text.split()
            out.append({"tokens": words, "tags": ["B-thing" if word in THINGS else "O" for word in words]})
        elif kind == "prompted":
            out.append({"prompt": text, "completion": colour})
        elif kind == "spans":
            out.append(
                {
                    "question": "the a",
                    "context": text,
                    "answers": {"text": [colour], "answer_start": [text.index(colour)]},
                }
            )
        else:
            out.append({"text": f"{text} . "})
    return out


def data_file(path: Path, kind: str, count: int = 60, seed: int = 0) -> Path:
    """Those rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count, seed)))
    return path
