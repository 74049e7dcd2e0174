"""Packing: exact bins, and per-token losses equal to those of examples alone, for every family or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from inlay.data.examples import MASKED
from inlay.data.packing import Layout, find_layout, first_fit_decreasing, pack
from inlay.errors import DataError
from tiny import tiny


def naive_first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = next((one for one in bins if sum(one) + length <= capacity), None)
        if fitting is None:
            bins.append([length])
        else:
            fitting.append(length)
    return bins


@given(st.lists(st.integers(1, 20), max_size=60))
def test_bins_are_those_of_first_fit_decreasing(lengths: list[int]) -> None:
    bins = first_fit_decreasing(np.array(lengths, np.int32), 20)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    expected = naive_first_fit_decreasing(lengths, 20)
    assert [sorted(lengths[i] for i in one) for one in bins] == [sorted(one) for one in expected]


def test_the_number_of_bins_does_not_depend_on_the_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    counts = {len(first_fit_decreasing(np.random.default_rng(s).permutation(lengths), 64)) for s in range(5)}
    assert len(counts) == 1


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(DataError, match="21 tokens does not fit into sequences of 20"):
        first_fit_decreasing(np.array([3, 21]), 20)


def rows_of(*texts: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": text, "labels": [MASKED, *text[1:]]} for text in texts]


@pytest.mark.parametrize("layout", ["positions", "mask", "flat"])
def test_the_first_token_of_an_example_is_no_target(layout: Layout) -> None:
    whole = [{"input_ids": text, "labels": text} for text in ([5, 6, 7], [8, 9])]
    inputs = pack([whole, whole[:1]], pad_token_id=0, width=8, layout=layout)
    ids, labels = inputs["input_ids"].flatten(), inputs["labels"].flatten()
    counted = labels[labels != MASKED]
    assert sorted(counted.tolist()) == [6, 6, 7, 7, 9]
    assert ids.shape == ((8,) if layout == "flat" else (16,))
    assert inputs["position_ids"].flatten()[:5].tolist() == [0, 1, 2, 0, 1]


def test_without_padding_in_one_row() -> None:
    model = tiny("qwen3")
    inputs = pack([rows_of([5, 6, 7, 8]), rows_of([9, 10], [11, 12, 13])], pad_token_id=0, width=99, layout="flat")
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    labels = inputs.pop("labels")
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits
        alone = [model(input_ids=torch.tensor([text])).logits for text in ([5, 6, 7, 8], [9, 10], [11, 12, 13])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)
    assert labels.tolist() == [[MASKED, 6, 7, 8, MASKED, 10, MASKED, 12, 13]]


PACKABLE = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKABLE)
def test_losses_of_packed_tokens_are_those_of_examples_alone(family: str, implementation: str) -> None:
    model = tiny(family)
    model.set_attn_implementation(implementation)
    layout = find_layout(model)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 100, (n,), generator=generator).tolist() for n in (7, 4, 9, 2, 11)]
    with torch.no_grad():
        alone = {}
        for number, text in enumerate(texts):
            logits = model(input_ids=torch.tensor([text])).logits[0]
            alone[number] = F.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="none")
        sequences = [[0, 2], [4, 1, 3]]
        inputs = pack([rows_of(*(texts[i] for i in row)) for row in sequences], pad_token_id=0, width=24, layout=layout)
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
    for b, row in enumerate(sequences):
        losses = F.cross_entropy(logits[b, :-1], labels[b, 1:], reduction="none", ignore_index=MASKED)
        packed = losses[labels[b, 1:] != MASKED]
        torch.testing.assert_close(packed, torch.cat([alone[i] for i in row]), atol=2e-5, rtol=1e-4)


def test_sliding_windows_take_positions_and_not_a_mask() -> None:
    assert find_layout(tiny("mistral")) == "positions"
    assert find_layout(tiny("opt")) == "mask"


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100), "BloomForCausalLM"),
        (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100), "MambaForCausalLM"),
    ],
)
def test_models_that_cannot_be_packed_are_found_out(config: Any, model: str) -> None:
    made = getattr(transformers, model)(config).train()
    state = torch.random.get_rng_state()
    with pytest.raises(DataError, match=f"{model} cannot keep packed examples apart"):
        find_layout(made)
    assert made.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_half_precision_models_are_judged_by_their_precision() -> None:
    assert find_layout(tiny("llama").to(torch.bfloat16)) == "positions"
    assert find_layout(tiny("opt").to(torch.bfloat16)) == "mask"
