"""Virtual tokens in a forward pass, against the base model run on embeddings put together by hand."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay.errors import AdapterError, AttachmentError
from inlay.methods.p_tuning import PTuning
from inlay.methods.prompt import Prompt
from tiny import CASES, batch, tiny

ENCODERS = ("bert", "roberta", "modernbert")
TOKEN_TASKS = [(f, t) for f, t in CASES if not (f in ("t5", "bart") and t == "cls")]
LENGTH = 4


def edge(family):
    return 1 if family in ENCODERS else 0


def attach(model, method, name="default", seed=3):
    adapter = inlay.attach(model, method, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if ".head." not in f".{key}.":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def vectors(adapter):
    """The virtual tokens [P, I] of an adapter."""
    (piece,) = [p for p in adapter.pieces.values() if hasattr(p, "places") and p.stored()]
    return piece()


def embedding(model):
    module = model.get_input_embeddings()
    return model.get_encoder().get_input_embeddings() if model.config.is_encoder_decoder else module


def by_hand(model, base, inputs, row, prompt, place):
    """Logits at the row's own tokens from a base model that gets embeddings: [.. at ..] prompt [.. rest ..]."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    plain = embedding(base)(ids)
    at = place if place >= 0 else len(ids) - ~place
    embeds = torch.cat([plain[:at], prompt, plain[at:]])[None]
    given = {"inputs_embeds": embeds}
    if base.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(type(base).forward).parameters:
        given["decoder_input_ids"] = inputs["decoder_input_ids"][row : row + 1]
        return base(**given).logits[0]
    logits = base(**given).logits[0]
    if logits.ndim == 1:
        return logits
    return torch.cat([logits[:at], logits[at + len(prompt) :]])


def own(logits, inputs, row):
    """The logits of a batch at one row's real tokens."""
    return logits[row] if logits.ndim == 2 else logits[row][inputs["attention_mask"][row].bool()]


def with_decoder(model, inputs):
    if "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        ids = torch.randint(5, 90, (inputs["input_ids"].shape[0], 6), generator=torch.Generator().manual_seed(9))
        inputs["decoder_input_ids"] = ids
    return inputs


@pytest.mark.parametrize(("family", "task"), TOKEN_TASKS)
def test_logits_are_those_of_embeddings_put_together_by_hand(family, task):
    model = tiny(family, task)
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH))
    inputs = with_decoder(model, batch(model, labels=False))
    logits = model(**inputs).logits
    for row in range(3):
        expected = by_hand(model, base, inputs, row, vectors(adapter), edge(family))
        got = logits[row] if "decoder_input_ids" in inputs else own(logits, inputs, row)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
