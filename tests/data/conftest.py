"""Tokenizers made on the spot: bytes with and without a chat template, WordPiece, one that loses characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the user and the assistant",
    "a film that is good, a film that is bad; what a lovely day in the old town by the sea",
    "John Smith went to New York with Ann and came back to Paris on Monday, 12 May 2020!",
    "system user assistant tool question answer prompt completion number one two three four five",
] * 3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


@pytest.fixture(scope="session")
def bytes_json() -> str:
    return _bytes().to_str()


@pytest.fixture(scope="session")
def bytes_tok(bytes_json: str) -> PreTrainedTokenizerBase:
    """Like GPT-2's: bytes, no token before or after a text, an end token, no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bytes_json), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def chat_tok(bytes_json: str) -> Callable[..., PreTrainedTokenizerBase]:
    """The same with a chat template; ChatML where none is given."""

    def make(template: str = CHATML) -> PreTrainedTokenizerBase:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(bytes_json),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=template,
        )

    return make


@pytest.fixture(scope="session")
def _pieces_json() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def pieces_tok(_pieces_json: str) -> PreTrainedTokenizerBase:
    """Like BERT's: lower case, WordPiece, [CLS] and [SEP], token types."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_pieces_json),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def words_tok() -> PreTrainedTokenizerBase:
    """Like T5's and Llama's: words carry the blank before them, also the first; <s> before a text; capitals unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([line.lower() for line in CORPUS] + ["\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write a file into the test's folder."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make
