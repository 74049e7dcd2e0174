"""`generate` with virtual tokens, against the base model's `generate` on embeddings put together by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import inlay
from inlay.errors import AdapterError
from inlay.methods.p_tuning import PTuning
from inlay.methods.prompt import Prompt
from tiny import batch, tiny

LENGTH = 4
NEW = 6
DECODERS = ("llama", "gpt2", "opt", "mistral", "gpt_neox", "qwen3")


def attach(model, method, name="default", seed=3):
    adapter = inlay.attach(model, method, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return adapter


def vectors(adapter):
    (piece,) = adapter.pieces.values()
    return piece()


def left(model, rows=3, length=7):
    return batch(model, rows, length, padding="left", labels=False)


def by_hand(base, inputs, row, prompt, **settings):
    """The new tokens of one row, generated from embeddings [prompt][text] without padding."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    if base.config.is_encoder_decoder:
        embeds = torch.cat([prompt, base.get_encoder().get_input_embeddings()(ids)])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return base.generate(inputs_embeds=embeds, attention_mask=mask, **settings)
    embeds = torch.cat([prompt, base.get_input_embeddings()(ids)])[None]
    return base.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]).long(), **settings)


def assert_rows(got, expected, pad):
    """Rows may be followed by padding where others went on."""
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine[: len(theirs)], theirs), (mine, theirs)
        assert (mine[len(theirs) :] == pad).all()


SETTINGS = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "chunks": {"do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sequences_are_those_of_embeddings_put_together_by_hand(family, setting):
    model = tiny(family)
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH))
    inputs, settings = left(model), {"max_new_tokens": NEW, **SETTINGS[setting]}
    sequences = model.generate(**inputs, **settings)
    each = settings.get("num_return_sequences", 1)
    text = inputs["input_ids"].repeat_interleave(each, 0)
    assert torch.equal(sequences[:, : text.shape[1]], text)
    settings.pop("prefill_chunk_size", None)
    expected = [s for row in range(3) for s in by_hand(base, inputs, row, vectors(adapter), **settings)]
    assert_rows(sequences[:, text.shape[1] :], expected, model.config.pad_token_id)
    with inlay.use(model, None):
        assert not torch.equal(model.generate(**inputs, **settings)[:, :], sequences)


@pytest.mark.parametrize("family", [*DECODERS[2:], "t5", "bart"])
def test_other_families_greedy(family):
    model = tiny(family)
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH))
    inputs = left(model) if not model.config.is_encoder_decoder else batch(model, 3, 7, labels=False)
    sequences = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    skip = 0 if model.config.is_encoder_decoder else 7
    expected = [by_hand(base, inputs, r, vectors(adapter), max_new_tokens=NEW, do_sample=False)[0] for r in range(3)]
    assert_rows(sequences[:, skip:], expected, model.config.pad_token_id)
