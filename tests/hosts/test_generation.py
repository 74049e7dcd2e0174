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


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_rows_with_different_prompts_or_none_in_one_call(family, beams):
    model = tiny(family)
    attach(model, Prompt(length=LENGTH), "short", 3)
    attach(model, Prompt(length=7), "long", 4)
    attach(model, inlay.LoRA(rank=2), "lora", 5)
    attach(model, PTuning(template="{prompt:1} {text} {prompt:2}", encoder="mlp"), "ends", 6)
    names = ["long", None, "short", "lora", "ends"]
    encdec = model.config.is_encoder_decoder
    inputs = batch(model, 5, 7, labels=False) if encdec else left(model, 5)
    settings = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams}
    with inlay.use(model, names):
        together = model.generate(**inputs, **settings)
    skip = 0 if encdec else 7
    assert torch.equal(together[:, :skip], inputs["input_ids"][:, :skip])
    for row, name in enumerate(names):
        with inlay.use(model, name):
            alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **settings)
        assert_rows(together[row : row + 1, skip:], alone[:, skip:], model.config.pad_token_id)


def test_what_looks_at_the_text_sees_the_users_ids_alone():
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH))
    inputs = left(model)
    seen: dict[str, list] = {"processor": [], "criterion": [], "stream": []}

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen["processor"].append(input_ids)
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen["criterion"].append(input_ids)
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7 + 4)

    sequences = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=LogitsProcessorList([Processor()]),
        stopping_criteria=StoppingCriteriaList([Criterion()]),
    )
    assert sequences.shape[1] == 7 + 4
    for kind, start in (("processor", 7), ("criterion", 8)):
        assert [ids.shape[1] for ids in seen[kind]] == list(range(start, start + 4))
        assert all(torch.equal(ids[:, :7], inputs["input_ids"]) for ids in seen[kind])

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            seen["stream"].append(value)

        def end(self):
            seen["stream"].append(None)

    one = {k: v[:1] for k, v in inputs.items()}
    whole = model.generate(**one, max_new_tokens=NEW, do_sample=False, streamer=Streamer())
    assert torch.equal(seen["stream"][0], one["input_ids"])
    assert torch.equal(torch.cat([v.reshape(-1) for v in seen["stream"][:-1]]), whole[0])


PROCESSING = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 100, 2))},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "min_new_tokens": {"min_new_tokens": NEW},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0)},
}


@pytest.mark.parametrize("processing", PROCESSING)
def test_built_in_processors_work_on_the_users_ids(processing):
    """The same as in a model without prompt whose processors are given the logits of the prompted one."""
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH), "a")
    ids = torch.tensor([[11, 12, 13, 11, 12]])
    got = model.generate(ids, max_new_tokens=NEW, do_sample=False, **PROCESSING[processing])

    class FromPrompted(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with inlay.use(model, "a"), torch.no_grad():
                del model.__dict__["_inlay_generating"]
                logits = model(input_ids=input_ids).logits[:, -1]
                model.__dict__["_inlay_generating"] = True
            return chain(input_ids, logits)

    with inlay.use(model, None):
        config = copy.deepcopy(model.generation_config)
        config.update(max_length=5 + NEW, **PROCESSING[processing])
        config.min_new_tokens = PROCESSING[processing].get("min_new_tokens")
        model._prepare_special_tokens(config)
        chain = model._get_logits_processor(config, input_ids_seq_length=5, device="cpu", model_kwargs={})
        expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, logits_processor=[FromPrompted()])
    assert torch.equal(got, expected)


class TestLengths:
    @pytest.fixture
    def model(self):
        model = tiny("llama")
        model.generation_config.eos_token_id = None
        attach(model, Prompt(length=LENGTH))
        return model

    def test_max_length_counts_the_users_ids(self, model):
        assert model.generate(torch.tensor([[9, 8, 7]]), max_length=10, do_sample=False).shape == (1, 10)
        config = GenerationConfig(max_length=9, do_sample=False, pad_token_id=0)
        assert model.generate(torch.tensor([[9, 8, 7]]), generation_config=config).shape == (1, 9)
        assert config.max_length == 9
        model.generation_config.max_length = 8
        assert model.generate(torch.tensor([[9, 8, 7]]), do_sample=False).shape == (1, 8)

    def test_max_new_tokens_and_none(self, model):
        assert model.generate(torch.tensor([[9, 8, 7]]), max_new_tokens=4, do_sample=False).shape == (1, 7)

    def test_minima_count_the_users_ids(self, model):
        ids = torch.tensor([[9, 8, 7]])
        free = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
        end = next(i for i in range(5, 11) if free[i] not in free[3:i])
        model.generation_config.eos_token_id = free[end]
        for least in ({"min_new_tokens": end - 3}, {"min_length": end}):
            assert model.generate(ids, max_new_tokens=8, **least, do_sample=False).shape == (1, end + 1)
        for least in ({"min_new_tokens": end - 2}, {"min_length": end + 1}):
            assert model.generate(ids, max_new_tokens=8, **least, do_sample=False).shape[1] > end + 1


def test_outputs_as_a_dictionary_and_going_on_from_its_cache():
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH))
    inputs = left(model)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, max_new_tokens=3, output_hidden_states=True, output_scores=True, **settings)
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(output.sequences, plain)
    assert len(output.scores) == 3
    assert [h.shape[1] for h in output.hidden_states[0]] == [7] * 3
    longer = {"input_ids": plain, "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 3).long()], 1)}
    expected = model.generate(**longer, max_new_tokens=3, do_sample=False)
    assert torch.equal(
        model.generate(**longer, max_new_tokens=3, past_key_values=output.past_key_values, **settings).sequences,
        expected,
    )
    with inlay.use(model, None):
        cache = model.generate(**inputs, max_new_tokens=1, **settings).past_key_values
    with pytest.raises(AdapterError, match="filled without the virtual tokens"):
        model.generate(**longer, max_new_tokens=3, past_key_values=cache)


def test_ids_that_hold_virtual_tokens_and_embeddings():
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH))
    ids = torch.tensor([[11, 12, 13], [21, 22, 23]])
    held = torch.cat([torch.arange(100, 100 + LENGTH).expand(2, -1), ids], 1)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    sequences = model.generate(held, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(sequences[:, : LENGTH + 3], held)
    assert torch.equal(sequences[:, LENGTH:], expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False), expected[:, 3:])


def test_from_the_beginning_of_sequence_alone():
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH))
    expected = model.generate(torch.tensor([[1]]), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(max_new_tokens=NEW, do_sample=False), expected)


def test_samples_are_those_of_the_same_logits():
    model = tiny("llama")
    adapter = attach(model, Prompt(length=LENGTH))
    base = copy.deepcopy(model)
    inlay.detach(base)
    ids = torch.tensor([[11, 12, 13]])
    torch.manual_seed(0)
    got = model.generate(ids, max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        got[:, 3:],
        by_hand(base, inputs, 0, vectors(adapter), max_new_tokens=NEW, do_sample=True, num_return_sequences=3),
    )


def test_an_assistant_speculates_to_the_same_text():
    model, assistant = tiny("llama"), tiny("llama", seed=1)
    attach(model, Prompt(length=LENGTH))
    ids = torch.tensor([[11, 12, 13, 11, 12]])
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    for speculation in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **speculation), expected)


@pytest.mark.parametrize(
    "setting", [{"guidance_scale": 1.5}, {"cache_implementation": "paged"}, {"custom_generate": lambda *a, **k: None}]
)
def test_what_cannot_work_is_refused(setting):
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH))
    with pytest.raises(AdapterError, match=next(iter(setting))):
        model.generate(torch.tensor([[11, 12]]), max_new_tokens=2, **setting)


def test_a_refused_call_leaves_no_trace():
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH))
    ids = torch.tensor([[11, 12, 13]])
    expected = model(input_ids=ids).logits
    with pytest.raises(AdapterError):
        model.generate(ids, max_new_tokens=2, guidance_scale=2.0)
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "searched", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}], ids=["greedy", "beams"]
)
def test_a_penalty_for_repetition_sees_the_text_of_each_row_alone(searched):
    """transformers looks up in the mask where a row begins; virtual tokens of other rows must not shift that."""
    model = tiny("llama")
    attach(model, Prompt(length=5), "p")
    inputs = left(model)
    settings = {
        "max_new_tokens": 1, "repetition_penalty": 5.0, "output_scores": True, "return_dict_in_generate": True,
        "pad_token_id": 0, **searched,
    }  # fmt: skip
    rows = [None, "p", None]
    with inlay.use(model, rows):
        together = model.generate(**inputs, **settings).scores[0]
    beams = len(together) // len(rows)
    for row, name in enumerate(rows):
        with inlay.use(model, name):
            alone = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **settings).scores[0]
        torch.testing.assert_close(together[row * beams : (row + 1) * beams], alone, rtol=1e-4, atol=1e-4)
