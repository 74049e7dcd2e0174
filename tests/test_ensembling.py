"""Prompt ensembling, against each adapter run by itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import inlay
from inlay.errors import AdapterError
from tiny import batch, tiny

NAMES = ["a", "b", "c"]


def with_prompts(family, task=None, spread=1.0):
    model = tiny(family, task)
    for seed, name in enumerate(NAMES):
        adapter = inlay.attach(model, inlay.Prompt(length=3 + seed), name, head=None)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            next(adapter.parameters()).copy_(torch.randn(3 + seed, 32, generator=generator) * spread)
    return model


def apart(model, run):
    results = []
    for name in NAMES:
        with inlay.use(model, name), torch.no_grad():
            results.append(run())
    return results


@pytest.mark.parametrize(("family", "task"), [("bert", "cls"), ("gpt2", "cls"), ("t5", "cls")])
def test_votes_and_means_are_those_of_the_adapters_alone(family, task):
    model = with_prompts(family, task)
    inputs = batch(model, 6)
    before = inlay.adapters(model), model._inlay_state.active
    result = inlay.ensemble(model, NAMES, inputs)
    assert (inlay.adapters(model), model._inlay_state.active) == before
    del inputs["labels"]
    each = torch.stack([x.log_softmax(-1) for x in apart(model, lambda: model(**inputs).logits)])
    torch.testing.assert_close(result.each, each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.log_probs, each.mean(0), rtol=1e-5, atol=1e-5)
    for row in range(6):
        votes = Counter(each[:, row].argmax(-1).tolist())
        assert result.votes[row].tolist() == [votes[c] for c in range(3)]
        most = [c for c in votes if votes[c] == max(votes.values())]
        assert int(result.predictions[row]) == max(most, key=lambda c: float(each[:, row, c].mean()))
    mean = inlay.ensemble(model, NAMES, inputs, vote="mean")
    assert torch.equal(mean.predictions, mean.log_probs.argmax(-1))


def test_majority_and_mean_can_differ():
    """Two prompts lean to class 0, one is sure of class 1."""
    model = with_prompts("bert", "cls")
    logits = torch.tensor([[[1.0, 0.9, -9.0]], [[1.0, 0.9, -9.0]], [[0.0, 9.0, -9.0]]]).reshape(3, 3)
    inputs = batch(model, 1, labels=False)
    assert inlay.ensemble(model, NAMES, inputs, read=lambda o, i: logits).predictions.tolist() == [0]
    assert inlay.ensemble(model, NAMES, inputs, "mean", read=lambda o, i: logits).predictions.tolist() == [1]


def test_a_language_model_is_read_through_a_verbalizer():
    model = with_prompts("bert", "mlm")
    verbalizer = inlay.Verbalizer({"yes": 20, "no": [21, 22], "maybe": 23}, mask_id=4)
    inputs = batch(model, 4, labels=False)
    inputs["input_ids"][:, 1] = 4
    result = inlay.ensemble(model, NAMES, inputs, read=verbalizer.scores)
    alone = apart(model, lambda: verbalizer.scores(model(**inputs), inputs).log_softmax(-1))
    torch.testing.assert_close(result.each, torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generated_answers_are_voted_on(family):
    model = with_prompts(family, spread=0.3)
    inputs = batch(model, 4, 6, padding="none" if family == "t5" else "left", labels=False)
    settings = {"max_new_tokens": 4, "do_sample": False}
    result = inlay.ensemble_generate(model, NAMES, inputs, **settings)
    pad = model.config.pad_token_id
    alone = apart(model, lambda: model.generate(**inputs, **settings))
    width = result.each.shape[-1]
    for mine, theirs in zip(result.each, alone, strict=True):
        assert torch.equal(mine, torch.nn.functional.pad(theirs, (0, width - theirs.shape[1]), value=pad))
    for row in range(4):
        texts = [tuple(each[row].tolist()) for each in result.each]
        most = max(Counter(texts).values())
        assert int(result.votes[row]) == most
        assert tuple(result.sequences[row].tolist()) == next(t for t in texts if Counter(texts)[t] == most)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_averaged_decoding_takes_the_best_token_of_the_average(family, beams):
    model = with_prompts(family)
    inputs = batch(model, 3, 6, padding="none", labels=False)
    result = inlay.ensemble_generate(model, NAMES, inputs, "mean", max_new_tokens=4, num_beams=beams, do_sample=False)
    assert torch.equal(result.each[0], result.each[1])
    assert torch.equal(result.each[0], result.each[2])
    assert torch.equal(result.sequences, result.each[0])
    if beams > 1:
        return
    text = result.sequences
    start = 1 if family == "t5" else inputs["input_ids"].shape[1]
    for row in range(3):
        for column in range(start, text.shape[1]):
            seen = text[row : row + 1, :column]
            if family == "t5":
                given = {"input_ids": inputs["input_ids"][row : row + 1], "decoder_input_ids": seen}
            else:
                given = {"input_ids": seen}
            mean = torch.stack(apart(model, lambda g=given: model(**g).logits[0, -1].log_softmax(-1))).mean(0)
            assert int(text[row, column]) == int(mean.argmax())
            if int(text[row, column]) == model.config.eos_token_id:
                break


def test_what_cannot_be_decided_is_refused():
    model = with_prompts("llama")
    inputs = batch(model, 2, labels=False)
    with pytest.raises(AdapterError, match="read="):
        inlay.ensemble(model, NAMES, inputs)
    with pytest.raises(AdapterError, match="vote='most' is not known"):
        inlay.ensemble(model, NAMES, inputs, "most")
    with pytest.raises(AdapterError, match="list of adapter names"):
        inlay.ensemble(model, "a", inputs)
    with pytest.raises(AdapterError, match="no adapter 'd'"):
        inlay.ensemble(model, ["a", "d"], inputs)
    with pytest.raises(AdapterError, match="do_sample=False"):
        inlay.ensemble_generate(model, NAMES, inputs, "mean", do_sample=True)
    with pytest.raises(AdapterError, match="one sequence for each row"):
        inlay.ensemble_generate(model, NAMES, inputs, num_return_sequences=2, num_beams=2)
