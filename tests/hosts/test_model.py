"""Virtual tokens in a forward pass, against the base model run on embeddings put together by hand."""

from __future__ import annotations

import copy
import functools
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


def edge(family, task):
    return 1 if family in ENCODERS or (family, task) == ("t5", "token") else 0


def attach(model, method, name="default", seed=3, head="auto"):
    example = None if hasattr(model, "config") else {"words": torch.arange(5)[None]}
    adapter = inlay.attach(model, method, name=name, head=head, example=example)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if ".head." not in f".{key}.":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def vectors(adapter):
    """The virtual tokens [P, I] of an adapter."""
    piece = next(p for p in adapter.pieces.values() if hasattr(p, "places"))
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
        expected = by_hand(model, base, inputs, row, vectors(adapter), edge(family, task))
        got = logits[row] if "decoder_input_ids" in inputs else own(logits, inputs, row)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "task"), [("llama", "cls"), ("gpt2", "cls"), ("opt", "cls"), ("bert", "cls")])
def test_classifiers_find_the_last_real_token_on_the_left_too(family, task):
    model = tiny(family, task)
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH))
    inputs = batch(model, padding="left", labels=False)
    if family == "gpt2":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if family == "bert":
        inputs = batch(model, padding="right", labels=False)
    logits = model(**inputs).logits
    for row in range(3):
        expected = by_hand(model, base, inputs, row, vectors(adapter), edge(family, task))
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_left_padding_changes_nothing_where_positions_follow_the_mask(family):
    model = tiny(family)
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH))
    inputs = batch(model, padding="left", labels=False)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs).logits
    for row in range(3):
        expected = by_hand(model, base, inputs, row, vectors(adapter), 0)
        torch.testing.assert_close(own(logits, inputs, row), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 3, -1, -2])
@pytest.mark.parametrize(("family", "task"), [("llama", "causal"), ("bert", "mlm"), ("t5", "seq2seq")])
def test_any_place_of_a_row(family, task, place):
    model = tiny(family, task)
    base = copy.deepcopy(model)
    method = PTuning(template="{prompt:3} {text}", encoder="mlp", places=((place, 3),))
    adapter = attach(model, method)
    inputs = with_decoder(model, batch(model, labels=False))
    logits = model(**inputs).logits
    for row in range(3):
        expected = by_hand(model, base, inputs, row, vectors(adapter), place)
        got = logits[row] if family == "t5" else own(logits, inputs, row)
        if family == "llama" and place:
            # A causal model's logits stand where the next token is predicted: at the last virtual one before it.
            ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            at = place if place > 0 else len(ids) - ~place
            embeds = embedding(base)(ids)
            whole = base(inputs_embeds=torch.cat([embeds[:at], vectors(adapter), embeds[at:]])[None]).logits[0]
            expected = torch.cat([whole[: at - 1], whole[at - 1 + 3 :]])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_loss_and_gradient_are_those_of_masked_labels_by_hand(family):
    model = tiny(family, "mlm" if family == "bert" else None)
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH, after=0))
    inputs = batch(model, 2)
    loss = model(**inputs).loss
    loss.backward()
    prompt = vectors(adapter).detach().clone().requires_grad_()
    embeds = torch.cat([prompt.expand(2, -1, -1), embedding(base)(inputs["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, LENGTH).long(), inputs["attention_mask"]], dim=1)
    labels = inputs["labels"]
    if family != "t5":
        labels = torch.cat([torch.full((2, LENGTH), -100), labels], dim=1)
    expected = base(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (parameter,) = adapter.parameters()
    torch.testing.assert_close(parameter.grad, prompt.grad, rtol=1e-4, atol=1e-6)


def test_a_users_own_next_token_loss_is_that_of_the_model():
    """With tokens behind and inside the text, `logits[:, :-1]` against `labels[:, 1:]` is still the language model."""
    model = tiny("llama")
    method = PTuning(template="{a} {prompt:2} {b} {prompt:2}", encoder="mlp", places=((3, 2), (-1, 2)))
    attach(model, method)
    inputs = batch(model)
    inputs["labels"][:, 0] = -100
    output = model(**inputs)
    logits, labels = output.logits[:, :-1].reshape(-1, 100), inputs["labels"][:, 1:].reshape(-1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, labels), output.loss, rtol=1e-6, atol=1e-6)


MIXED = [
    ("llama", "causal"),
    ("gpt2", "cls"),
    ("opt", "causal"),
    ("bert", "token"),
    ("t5", "seq2seq"),
    ("qwen3", "token"),
]


def four(model):
    attach(model, Prompt(length=LENGTH), "short", 3, None)
    attach(model, Prompt(length=7), "long", 4, None)
    attach(model, inlay.LoRA(rank=2, alpha=1), "lora", 5, None)
    attach(model, PTuning(template="{prompt:2} {text} {prompt:1}", encoder="mlp"), "ends", 6, None)


@pytest.mark.parametrize(("family", "task"), MIXED)
def test_rows_of_a_mixed_batch_are_the_rows_alone(family, task):
    model = tiny(family, task)
    four(model)
    names = ["long", None, "short", "lora", "ends", ("short", "lora"), "long", ("ends", "short")]
    inputs = with_decoder(model, batch(model, rows=8))
    inputs.pop("decoder_input_ids", None)
    inlay.use(model, names)
    parameters = [(n, a, p) for n, a in inlay.adapters(model).items() for p in a.parameters()]
    whole = model(**inputs)
    weight = torch.randn(whole.logits.shape, generator=torch.Generator().manual_seed(1))
    if task not in ("cls", "seq2seq"):
        weight = weight * inputs["attention_mask"][..., None]
    together = torch.autograd.grad((whole.logits * weight).sum(), [p for *_, p in parameters], allow_unused=True)
    apart = [torch.zeros_like(p) for *_, p in parameters]
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        with inlay.use(model, name):
            logits = model(**alone).logits
        real = inputs["attention_mask"][row].bool() if task not in ("cls", "seq2seq") else ...
        torch.testing.assert_close(whole.logits[row][real], logits[0][real], rtol=1e-5, atol=1e-5)
        part = [p for n, _, p in parameters if n == name or n in (name or ())]
        if part:
            own_grads = torch.autograd.grad((logits * weight[row : row + 1]).sum(), part, allow_unused=True)
            found = dict(zip(map(id, part), own_grads, strict=True))
            for total, (*_, p) in zip(apart, parameters, strict=True):
                total += found[id(p)] if found.get(id(p)) is not None else 0
    for (name, _, _), mine, theirs in zip(parameters, together, apart, strict=True):
        mine = torch.zeros_like(theirs) if mine is None else mine
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * max(1, float(theirs.abs().max())), msg=name)


@given(st.lists(st.sampled_from([None, "short", "long", "ends", "lora"]), min_size=2, max_size=5), st.booleans())
def test_any_mix_of_rows(names, left_padded):
    model = mixed_llama()
    inputs = batch(model, len(names), padding="left" if left_padded else "right", labels=False)
    with inlay.use(model, list(names)):
        whole = model(**inputs).logits
    for row, name in enumerate(names):
        with inlay.use(model, name):
            alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(whole[row][real], alone[0][real], rtol=1e-5, atol=1e-5)


@functools.cache
def mixed_llama():
    model = tiny("llama")
    four(model)
    return model


def test_a_row_without_prompt_keeps_the_bits_of_the_base_where_no_other_row_has_one():
    model = tiny("llama")
    inputs = batch(model, labels=False)
    expected = model(**inputs).logits
    four(model)
    with inlay.use(model, None):
        assert torch.equal(model(**inputs).logits, expected)
    with inlay.use(model, [None, None, None]):
        assert torch.equal(model(**inputs).logits, expected)


class TestIdsThatHoldVirtualTokens:
    def test_they_are_taken_as_they_are(self):
        model = tiny("llama")
        attach(model, Prompt(length=LENGTH))
        inputs = batch(model)
        expected = model(**inputs)
        virtual = torch.arange(100, 100 + LENGTH).expand(3, -1)
        given = {
            "input_ids": torch.cat([virtual, inputs["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(virtual), inputs["attention_mask"]], 1),
            "labels": torch.cat([torch.full_like(virtual, -100), inputs["labels"]], 1),
        }
        output = model(**given)
        assert torch.equal(output.logits[:, LENGTH:], expected.logits)
        assert torch.equal(output.loss, expected.loss)

    def test_rows_with_and_without_them_in_one_batch(self):
        model = tiny("llama")
        attach(model, Prompt(length=LENGTH))
        plain, rest = torch.arange(10, 18)[None], torch.arange(20, 24)
        held = torch.cat([torch.arange(100, 100 + LENGTH), rest])[None]
        both = model(input_ids=torch.cat([plain, held])).logits
        torch.testing.assert_close(both[:1], model(input_ids=plain).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both[1:, LENGTH:], model(input_ids=rest[None]).logits, rtol=1e-5, atol=1e-5)

    def test_an_id_that_the_row_does_not_have_is_refused(self):
        model = tiny("llama")
        attach(model, Prompt(length=LENGTH), "a")
        attach(model, Prompt(length=LENGTH + 2), "b")
        ids = torch.arange(10, 18).repeat(2, 1)
        ids[1, 2] = 100 + LENGTH
        refused = pytest.raises(AdapterError, match=r"row 1 holds id 104 at position 2.*have 4")
        with inlay.use(model, ["b", "a"]), refused:
            model(input_ids=ids)
        with inlay.use(model, "a"), pytest.raises(IndexError):
            model.model(input_ids=ids)

    def test_a_template_between_texts_needs_them(self):
        model = tiny("llama")
        attach(model, PTuning(template="{a} {prompt:2} {b}", encoder="mlp"))
        with pytest.raises(AdapterError, match="fill_template"):
            model(**batch(model))
        ids = torch.tensor([[10, 11, 100, 101, 12]])
        assert model(input_ids=ids).logits.shape == (1, 5, 100)


def test_hidden_states_tuples_and_kept_logits_line_up_with_the_ids():
    model = tiny("llama")
    attach(model, PTuning(template="{prompt:2} {text} {prompt:1}", encoder="mlp"))
    inputs = batch(model, labels=False)
    output = model(**inputs, output_hidden_states=True)
    assert [h.shape for h in output.hidden_states] == [(3, 9, 32)] * 3
    real = inputs["attention_mask"].bool()
    embedded = embedding(model)(inputs["input_ids"])
    assert torch.equal(output.hidden_states[0][real], embedded[real])
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits)
    for keep in (1, 4, 50):
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, output.logits[:, -min(keep, 9) :])
    chosen = torch.tensor([0, 5, 8])
    torch.testing.assert_close(model(**inputs, logits_to_keep=chosen).logits, output.logits[:, chosen])
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, output.logits)


def test_spans_of_question_answering_move_with_the_text():
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertForQuestionAnswering(config).eval()
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=LENGTH))
    ids = torch.randint(5, 100, (2, 9))
    start, end = torch.tensor([0, 4]), torch.tensor([3, 8])
    output = model(input_ids=ids, start_positions=start, end_positions=end)
    embeds = embedding(base)(ids)
    embeds = torch.cat([embeds[:, :1], vectors(adapter).expand(2, -1, -1), embeds[:, 1:]], 1)
    moved = [p + LENGTH * (p > 0) for p in (start, end)]
    expected = base(inputs_embeds=embeds, start_positions=moved[0], end_positions=moved[1])
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    columns = [0, *range(1 + LENGTH, 9 + LENGTH)]
    torch.testing.assert_close(output.start_logits, expected.start_logits[:, columns], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_embeddings_instead_of_ids(family):
    model = tiny(family)
    attach(model, Prompt(length=LENGTH), "a")
    inputs = with_decoder(model, batch(model, labels=False))
    expected = model(**inputs).logits
    given = {**inputs, "inputs_embeds": embedding(model)(inputs["input_ids"])}
    del given["input_ids"]
    torch.testing.assert_close(model(**given).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_decoding_by_hand_from_a_cache(mixed):
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH), "a")
    ids = torch.randint(5, 90, (2, 8))
    if mixed:
        inlay.use(model, ["a", None])
    mask, positions = torch.ones(2, 8).long(), torch.arange(8).expand(2, 8)
    more = {"attention_mask": mask, "position_ids": positions}
    whole = model(input_ids=ids, **more).logits
    cache = model(input_ids=ids[:, :6], **{k: v[:, :6] for k, v in more.items()}, use_cache=True).past_key_values
    step = {"attention_mask": mask, "position_ids": positions[:, 6:]}
    rest = model(input_ids=ids[:, 6:], past_key_values=cache, **step).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-5, atol=1e-5)
    if mixed:
        with pytest.raises(AdapterError, match="attention_mask and position_ids"):
            model(input_ids=ids[:, :1], past_key_values=cache)
    with inlay.use(model, None):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="filled without the virtual tokens"):
        model(input_ids=ids[:, :1], past_key_values=cache)


class TestRefusals:
    @pytest.fixture
    def model(self):
        model = tiny("llama")
        attach(model, Prompt(length=LENGTH))
        return model

    def test_masks_of_another_shape(self, model):
        ids = torch.randint(5, 90, (2, 8))
        with pytest.raises(AdapterError, match=r"not \(2, 1, 8, 8\)"):
            model(input_ids=ids, attention_mask=torch.ones(2, 1, 8, 8))

    def test_packed_texts(self, model):
        ids, positions = torch.randint(5, 90, (1, 8)), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
        with pytest.raises(AdapterError, match="packed"):
            model(input_ids=ids, position_ids=positions)

    def test_unknown_values_for_each_token(self, model):
        ids = torch.randint(5, 90, (2, 8))
        with pytest.raises(AdapterError, match="shift_labels has one value for each token"):
            model(input_ids=ids, shift_labels=ids)

    def test_resized_embeddings(self):
        model = tiny("llama", tie_word_embeddings=False)
        attach(model, Prompt(length=LENGTH))
        embeddings = torch.nn.Embedding(120, 32)
        model.model.embed_tokens = embeddings
        with pytest.raises(AttachmentError, match="no longer the embedding"):
            model(input_ids=torch.randint(5, 90, (2, 8)))

    def test_encoder_outputs_without_ids(self):
        model = tiny("t5")
        encoded = model.get_encoder()(torch.arange(10, 15)[None])
        attach(model, Prompt(length=LENGTH))
        with pytest.raises(AdapterError, match="encoder_outputs"):
            model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[0]]))

    def test_a_decoder_that_would_copy_the_encoders_ids(self):
        model = tiny("bart")
        attach(model, Prompt(length=LENGTH))
        with pytest.raises(AdapterError, match="Pass decoder_input_ids or labels"):
            model(input_ids=torch.arange(10, 15)[None])

    def test_a_call_without_ids(self, model):
        with pytest.raises(AdapterError, match="called without rows of token ids"):
            model(attention_mask=torch.ones(2, 8))


class Bag(torch.nn.Module):
    """A model of a user's own, whose ids have another name."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, words):
        return self.out(self.embed(words)).cumsum(1)


def test_a_model_of_ones_own():
    model, words = Bag(), torch.randint(10, (3, 5))
    base = copy.deepcopy(model)
    adapter = inlay.attach(model, Prompt(length=2, after=0), example={"words": words})
    expected = base.out(torch.cat([vectors(adapter).expand(3, -1, -1), base.embed(words)], 1)).cumsum(1)[:, 2:]
    torch.testing.assert_close(model(words), expected)
    torch.testing.assert_close(model(words=words), expected)
    with pytest.raises(AdapterError, match="called without rows of token ids"):
        model(torch.randint(10, (5,)))


def test_other_embeddings_of_the_vocabulary_see_padding():
    """As in Gemma 4, which looks every token up once more for its layers."""

    class Twice(Bag):
        def __init__(self):
            super().__init__()
            self.second = torch.nn.Embedding(10, 4, padding_idx=3)

        def forward(self, words):
            return self.out(self.embed(words) * self.second(words).add(1)).cumsum(1)

    model, words = Twice(), torch.randint(10, (3, 5))
    base = copy.deepcopy(model)
    adapter = attach(model, Prompt(length=2, after=0), head=None)
    assert adapter.trained_parameters == adapter.stored_parameters == 8
    first = torch.cat([vectors(adapter).expand(3, -1, -1), base.embed(words)], 1)
    second = torch.cat([torch.zeros(3, 2, 4), base.second(words)], 1)
    torch.testing.assert_close(model(words), base.out(first * second.add(1)).cumsum(1)[:, 2:])
    adapter.detach()
    assert type(model.second) is torch.nn.Embedding


def test_rows_that_become_longer_than_the_model_has_positions():
    model = tiny("gpt2")
    attach(model, Prompt(length=LENGTH))
    assert model(input_ids=torch.full((1, 60), 7)).logits.shape == (1, 60, 100)
    with pytest.raises(AdapterError, match="longer than it has positions"):
        model(input_ids=torch.full((1, 61), 7))


def test_a_model_without_token_embedding_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(inlay.errors.MethodError, match="names none"):
        inlay.attach(model, Prompt(), example={"input": torch.randn(2, 4)})


@pytest.mark.parametrize("task", ["seq2seq", "cls"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_have_a_prompt_only_where_the_model_copies_its_input(family, task):
    model = tiny(family, task)
    adapter = attach(model, Prompt(length=LENGTH))
    assert [s.name for s in adapter.sites].count("embed") == (1 if task == "seq2seq" else 2)
    assert adapter.trained_parameters - adapter.head_parameters == LENGTH * 32
    inputs = batch(model)
    one = model(**inputs)
    two = copy.deepcopy(model)(**inputs)
    assert torch.equal(one.logits, two.logits)
    assert one.encoder_last_hidden_state.shape == (3, 9, 32)
    one.loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_signatures_are_kept_and_survive_pickle():
    model = tiny("llama")
    forward, generate = (inspect.signature(getattr(type(model), n)) for n in ("forward", "generate"))
    attach(model, Prompt(length=LENGTH))
    from inlay.hosts import base as hosting

    inputs = batch(model)
    blob, logits = pickle.dumps(model), model(**inputs).logits
    known = dict(hosting._classes)
    hosting._classes.clear()
    try:
        again = pickle.loads(blob)
        for found in (model, again):
            assert inspect.signature(type(found).forward) == forward
            assert inspect.signature(type(found).generate) == generate
        assert torch.equal(again(**inputs).logits, logits)
    finally:
        hosting._classes.clear()
        hosting._classes.update(known)
    encoder = tiny("bert", "mlm")
    attach(encoder, Prompt(length=LENGTH))
    assert not hasattr(encoder, "generate")


@pytest.mark.parametrize("rows", [None, ["a", None, "b"]])
def test_compiles_whole_and_sees_a_later_attach(rows):
    model = tiny("llama")
    inputs = batch(model, labels=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(**inputs)
    attach(model, Prompt(length=LENGTH), "a")
    attach(model, Prompt(length=2), "b", 8)
    if rows is not None:
        inlay.use(model, rows)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_gradient_checkpointing_gives_the_same_gradient():
    grads = []
    for checkpointing in (False, True):
        model = tiny("llama")
        adapter = attach(model, Prompt(length=LENGTH))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch(model)).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_model_in_half_precision_keeps_its_dtype():
    model = tiny("llama", dtype=torch.bfloat16)
    adapter = attach(model, Prompt(length=LENGTH))
    output = model(**batch(model))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_rows_that_do_not_fit_the_route_are_refused():
    model = tiny("llama")
    attach(model, Prompt(length=LENGTH), "a")
    inlay.use(model, ["a", None])
    with pytest.raises(AdapterError, match="2 rows, but the batch has 3"):
        model(**batch(model))
