"""Prompt tuning: the four initialisations, published counts, PEFT as oracle, the life of an adapter."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import inlay
from inlay.errors import MethodError
from inlay.methods.prompt import SAMPLED
from tiny import batch, tiny

LENGTH = 5


def table(adapter):
    (piece,) = adapter.pieces.values()
    return piece.P


def weight(model):
    return model.get_input_embeddings().weight.detach().clone()


class TestInitialisation:
    def test_vocab_draws_different_rows_of_the_embedding(self):
        model = tiny("llama")
        E = weight(model)
        P = table(inlay.attach(model, inlay.Prompt(length=60)))
        ids = [int((row == E).all(1).nonzero()) for row in P]
        assert len(set(ids)) == 60
        assert ids != sorted(ids)

    def test_vocab_draws_from_the_most_frequent_ids_only(self):
        model = tiny("llama", vocab_size=SAMPLED + 800)
        E = weight(model)
        P = table(inlay.attach(model, inlay.Prompt(length=400), head=None))
        ids = torch.cdist(P[None], E[None])[0].argmin(1)
        assert int(ids.max()) < SAMPLED
        assert int(ids.max()) > SAMPLED // 2
        assert len(ids.unique()) == 400

    def test_more_tokens_than_words_are_drawn_with_replacement(self):
        model = tiny("llama")
        P = table(inlay.attach(model, inlay.Prompt(length=130)))
        assert P.shape == (130, 32)

    def test_uniform_has_the_papers_bounds(self):
        P = table(inlay.attach(tiny("llama"), inlay.Prompt(length=100, init="uniform")))
        assert -0.5 <= P.min() < -0.45
        assert 0.45 < P.max() <= 0.5
        assert abs(P.mean()) < 0.02
        P = table(inlay.attach(tiny("llama"), inlay.Prompt(length=100, init="uniform", scale=2.0)))
        assert 1.9 < P.max() <= 2.0

    def test_text_is_row_by_row_and_the_rest_is_sampled(self):
        model = tiny("llama")
        E = weight(model)
        P = table(inlay.attach(model, inlay.Prompt(length=LENGTH, init="text", text_ids=(9, 7, 9))))
        assert torch.equal(P[:3], E[[9, 7, 9]])
        assert all((row == E).all(1).any() for row in P[3:])

    def test_classes_are_means_of_their_tokens(self):
        model = tiny("llama")
        E = weight(model)
        P = table(inlay.attach(model, inlay.Prompt(length=LENGTH, init="classes", class_ids=((9,), (7, 8, 30)))))
        torch.testing.assert_close(P[0], E[9])
        torch.testing.assert_close(P[1], (E[7] + E[8] + E[30]) / 3)
        assert all((row == E).all(1).any() for row in P[2:])

    def test_embeddings_are_taken_as_the_model_scales_them(self):
        model = tiny("bart", scale_embedding=True)
        P = table(inlay.attach(model, inlay.Prompt(length=2, init="text", text_ids=(9, 7))))
        torch.testing.assert_close(P, model.get_encoder().get_input_embeddings().weight[[9, 7]] * 32**0.5)

    def test_a_second_adapter_starts_from_the_base_not_from_the_first(self):
        model = tiny("llama")
        E = weight(model)
        inlay.attach(model, inlay.Prompt(length=2), "a")
        inlay.attach(model, inlay.LoRA(sites="embed"), "e")
        second = inlay.attach(model, inlay.Prompt(length=2, init="text", text_ids=(9, 7)), "b")
        assert torch.equal(table(second), E[[9, 7]])

    def test_helpers_turn_strings_into_ids(self):
        class Tokenizer:
            def __call__(self, text, add_special_tokens):
                assert not add_special_tokens
                return {"input_ids": [len(word) for word in text.split()]}

        prompt = inlay.Prompt.from_text(Tokenizer(), "classify the review")
        assert (prompt.init, prompt.length, prompt.text_ids) == ("text", 3, (8, 3, 6))
        assert inlay.Prompt.from_text(Tokenizer(), "classify the review", length=7).length == 7
        prompt = inlay.Prompt.from_classes(Tokenizer(), ["good", "not good"], length=4)
        assert (prompt.init, prompt.length, prompt.class_ids) == ("classes", 4, ((4,), (3, 4)))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"init": "text"}, "from_text"),
            ({"text_ids": (1, 2)}, "go together"),
            ({"init": "classes"}, "from_classes"),
            ({"init": "text", "text_ids": (1, 2, 3), "length": 2}, "do not fit"),
            ({"init": "classes", "class_ids": ((1,), ())}, "without tokens"),
            ({"length": 0}, "greater than or equal to 1"),
            ({"init": "zeros"}, "init: expected one of .*, got 'zeros'"),
            ({"lenght": 3}, "did you mean 'length'"),
        ],
    )
    def test_contradictions_are_refused(self, settings, words):
        with pytest.raises(MethodError, match=words):
            inlay.Prompt(**settings)

    def test_ids_of_another_tokenizer_are_refused(self):
        with pytest.raises(MethodError, match=r"ids \[100\] are not in the vocabulary of 100"):
            inlay.attach(tiny("llama"), inlay.Prompt(init="text", text_ids=(5, 100)))


T5 = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
PUBLISHED = {"small": 51_200, "base": 76_800, "large": 102_400, "xl": 204_800, "xxl": 409_600}


@pytest.mark.parametrize("size", T5)
@pytest.mark.proves("count", "prompt")
def test_counts_of_t5_with_the_papers_hundred_tokens(size):
    """0.0037 % of the 11,135,332,352 parameters of XXL; PEFT allocates twice as many and trains half of them."""
    width = T5[size]
    config = transformers.T5Config(
        d_model=width,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        d_kv=64,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    adapter = inlay.attach(model, inlay.Prompt(length=100))
    assert adapter.trained_parameters == adapter.stored_parameters == PUBLISHED[size]
    if size == "xxl":
        assert round(11_135_332_352 / adapter.trained_parameters) == 27_186


def peft_model(model, kind, task, **settings):
    config = peft.PromptTuningConfig if kind == "prompt" else peft.PromptEncoderConfig
    wrapped = peft.get_peft_model(model, config(task_type=task, num_virtual_tokens=LENGTH, **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return wrapped.eval()


TASKS = {
    ("llama", "causal"): "CAUSAL_LM",
    ("gpt2", "causal"): "CAUSAL_LM",
    ("opt", "causal"): "CAUSAL_LM",
    ("bert", "token"): "TOKEN_CLS",
    ("bert", "cls"): "SEQ_CLS",
    ("roberta", "token"): "TOKEN_CLS",
    ("t5", "seq2seq"): "SEQ_2_SEQ_LM",
    ("bart", "seq2seq"): "SEQ_2_SEQ_LM",
}


@pytest.mark.parametrize(("family", "task"), TASKS)
@pytest.mark.proves("oracle", "prompt")
def test_logits_loss_and_gradient_equal_those_of_peft(family, task):
    model = tiny(family, task)
    theirs = peft_model(copy.deepcopy(model), "prompt", TASKS[family, task])
    adapter = inlay.attach(model, inlay.Prompt(length=LENGTH, after=0), head=None)
    parameter = next(adapter.parameters())
    prompt = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        parameter.copy_(prompt[:LENGTH])
    # PEFT cannot take the labels of a token classifier: it does not extend them.
    inputs = batch(model, labels=task != "token")
    ours, expected = model(**inputs), theirs(**inputs)
    logits = ours.logits, expected.logits[:, LENGTH:] if task in ("causal", "token") else expected.logits
    if task == "token":
        logits = [x[inputs["attention_mask"].bool()] for x in logits]
        ours.loss, expected.loss = (x.square().mean() for x in logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(parameter.grad, prompt.grad[:LENGTH], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generated_text_equals_that_of_peft(family):
    model = tiny(family)
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    theirs = peft_model(copy.deepcopy(model), "prompt", task)
    adapter = inlay.attach(model, inlay.Prompt(length=LENGTH))
    with torch.no_grad():
        next(adapter.parameters()).copy_(theirs.prompt_encoder["default"].embedding.weight[:LENGTH])
    inputs = batch(model, 2, 7, padding="none", labels=False)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), theirs.generate(**inputs, **settings))


def test_saved_and_loaded_logits_are_the_same_bits(tmp_path):
    for family, task in [("llama", "causal"), ("bert", "cls"), ("t5", "cls")]:
        model = tiny(family, task)
        adapter = inlay.attach(model, inlay.Prompt(length=LENGTH))
        with torch.no_grad():
            next(adapter.parameters()).add_(torch.randn(LENGTH, 32))
        inputs = batch(model)
        logits = model(**inputs).logits
        adapter.save(tmp_path / family)
        adapter.detach()
        again = inlay.load(model, tmp_path / family)
        assert again.stored_parameters == again.trained_parameters
        assert torch.equal(model(**inputs).logits, logits)


def test_it_learns_and_only_it_learns():
    model = tiny("gpt2", dropout=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter = inlay.attach(model, inlay.Prompt(length=LENGTH))
    model.train()
    inputs = batch(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in before.items())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["transformer.wte.inlay.default.prompt.P"]


def test_detaching_restores_the_model():
    model = tiny("bert", "cls")
    keys, cls, inputs = list(model.state_dict()), type(model), batch(model)
    expected, required = model(**inputs).logits, [p.requires_grad for p in model.parameters()]
    adapter = inlay.attach(model, inlay.Prompt(length=LENGTH))
    assert [k for k in model.state_dict() if ".inlay." not in k] == keys
    adapter.detach()
    assert type(model) is cls
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(model(**inputs).logits, expected)
    assert "_inlay_state" not in model.__dict__
