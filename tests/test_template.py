"""Templates: what they mean as text, where their virtual tokens stand, and that both ways into a model agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import inlay
from inlay.errors import DataError, MethodError
from inlay.template import Template
from tiny import tiny

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *"abcdefghij", "Question", "Answer", ":", "?", ".", "yes", "no"]


def tokenizer(specials=True, side="right"):
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if specials:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        padding_side=side,
    )


def spell(ids, first=100):
    return " ".join(f"P{i - first}" if i >= first else WORDS[i] for i in ids)


def filled(template, rows, family="bert", task="mlm", encoder="mlp", counted=True, **options):
    own = tokenizer(specials=family == "bert", side="left" if family == "llama" else "right")
    method = (
        inlay.PTuning.from_template(own, template, encoder=encoder)
        if counted
        else inlay.PTuning(template=template, encoder=encoder)
    )
    model = tiny(family, task)
    adapter = inlay.attach(model, method)
    return model, adapter, own, inlay.fill_template(adapter, own, rows, **options)


@pytest.mark.parametrize(
    ("template", "text", "groups"),
    [
        ("{prompt:3} {text} {prompt:3} [MASK]", "a b [MASK]", (0, 3)),
        ("{text}{prompt:1}", "a b", (3,)),
        ("{prompt:1} {prompt:2} {text}", "a b", (0, 0)),
        ("x {prompt:1}{text}", "x a b", (1,)),
        ("x{prompt:1}{text}", "xa b", (1,)),
        ("x {prompt:1} {prompt:1} {text} .", "x a b .", (1, 1)),
        ("{{{text}}} {prompt:2}", "{a b}", (5,)),
    ],
)
def test_without_its_runs_a_template_is_an_ordinary_text(template, text, groups):
    rendered = Template(template).render({"text": "a b"})
    assert rendered.text == text
    assert rendered.groups == groups
    begin, end = rendered.fields["text"]
    assert rendered.text[begin:end] == "a b"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{text}", "no virtual tokens"),
        ("{prompt:x}", "at least 1"),
        ("{prompt:3!r}", "at least 1"),
        ("{a.b} {prompt:1}", "is no field"),
        ("{} {prompt:1}", "is no field"),
        ("{text {prompt:1}", "brace"),
    ],
)
def test_what_cannot_be_read_is_refused(template, words):
    with pytest.raises(MethodError, match=words):
        Template(template)


def test_the_lama_form():
    template = "{prompt:2} [MASK] {prompt:2} {x} {prompt:1}"
    _, adapter, _, batch = filled(template, [{"x": "a b"}, {"x": "c"}])
    assert [spell(ids) for ids in batch["input_ids"].tolist()] == [
        "[CLS] P0 P1 [MASK] P2 P3 a b P4 [SEP]",
        "[CLS] P0 P1 [MASK] P2 P3 c P4 [SEP] [PAD]",
    ]
    assert batch["attention_mask"].sum(1).tolist() == [10, 9]
    assert adapter.method.places == ((1, 2), (2, 2), (-2, 1))


def test_the_form_for_entailment():
    template = "{premise} Question: {hypothesis}? {prompt:1} Answer: [MASK]."
    _, adapter, _, batch = filled(template, [{"premise": "a b", "hypothesis": "c"}])
    assert adapter.method.places is None
    assert spell(batch["input_ids"][0].tolist()) == "[CLS] a b Question : c ? P0 Answer : [MASK] . [SEP]"


def test_a_causal_model_is_padded_on_its_tokenizers_side():
    template = "{prompt:2} {x} {prompt:1}"
    _, adapter, _, batch = filled(template, [{"x": "a b"}, {"x": "c"}], "llama", "causal")
    assert [spell(ids) for ids in batch["input_ids"].tolist()] == ["P0 P1 a b P2", "[PAD] P0 P1 c P2"]
    assert adapter.method.places == ((0, 2), (-1, 1))


TEMPLATES = [
    "{prompt:2} {x} {prompt:1}",
    "{prompt:2} {x} {prompt:1} [MASK]",
    "[MASK] {prompt:1} {x}",
    "{prompt:2} [MASK] {prompt:2} {x} {prompt:1}",
]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ordinary_ids_of_the_same_text_give_the_same_logits(template, counted):
    """Both ways into the model agree, whether or not a tokenizer has counted the places."""
    rows = [{"x": "a b c"}, {"x": "d"}]
    model, _, own, batch = filled(template, rows, counted=counted)
    texts = [Template(template).render(row).text for row in rows]
    plain = own(texts, return_tensors="pt", padding=True)
    held = model(**batch).logits
    if not counted and "MASK" in template:
        with pytest.raises(inlay.errors.AdapterError, match="fill_template"):
            model(**plain)
        return
    expected = [row[(ids < 100) & mask.bool()] for row, ids, mask in zip(held, *batch.values(), strict=True)]
    got = model(**plain).logits
    for row in range(2):
        real = plain["attention_mask"][row].bool()
        torch.testing.assert_close(got[row][real], expected[row], rtol=1e-5, atol=1e-5)


@given(st.text(alphabet="abc ", min_size=1), st.text(alphabet="abc ", min_size=1))
def test_any_texts_keep_their_tokens_and_their_order(a, b):
    own, template = tokenizer(), Template("x {prompt:2} {a} {prompt:1}{b} {prompt:3} .")
    from inlay.template import fill_row

    ids = fill_row(template, own, {"a": a, "b": f" {b}"}, 100)
    assert spell(ids).split() == [
        "[CLS]", "[UNK]", "P0", "P1", *_known(a), "P2", *_known(b), "P3", "P4", "P5", ".", "[SEP]"
    ]  # fmt: skip


def _known(text):
    return [word if word in WORDS else "[UNK]" for word in text.split()]


def test_long_rows_are_shortened_in_one_field():
    template = "{p} Question: {h}? {prompt:2} [MASK]"
    row = {"p": "a b c d e f", "h": "g h i"}
    _, adapter, own, batch = filled(template, [row], max_length=14)
    assert spell(batch["input_ids"][0].tolist()) == "[CLS] a b c Question : g h i ? P0 P1 [MASK] [SEP]"
    batch = inlay.fill_template(adapter, own, [row], max_length=16, shorten="h")
    assert spell(batch["input_ids"][0].tolist()) == "[CLS] a b c d e f Question : g h ? P0 P1 [MASK] [SEP]"
    with pytest.raises(DataError, match="cannot be cut further"):
        inlay.fill_template(adapter, own, [row], max_length=7)
    with pytest.raises(DataError, match="shorten='q' is no field"):
        inlay.fill_template(adapter, own, [row], max_length=7, shorten="q")


def test_rows_that_do_not_fit_the_template_are_refused():
    _, adapter, own, _ = filled("{prompt:1} {text}", [{"text": "a"}])
    with pytest.raises(DataError, match=r"no field 'text'.*did you mean 'txt'"):
        inlay.fill_template(adapter, own, [{"txt": "a"}])
    with pytest.raises(DataError, match="must be a text, not int"):
        inlay.fill_template(adapter, own, [{"text": 3}])
    with pytest.raises(DataError, match="no rows"):
        inlay.fill_template(adapter, own, [])


def test_a_token_across_a_run_is_refused():
    raw = Tokenizer(models.WordLevel({"ab": 0, "[UNK]": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    adapter = inlay.attach(tiny("llama"), inlay.PTuning(template="{x}{prompt:1}{y}", encoder="mlp"))
    with pytest.raises(DataError, match="joins the texts before and after"):
        inlay.fill_template(adapter, own, [{"x": "a", "y": "b"}])


def test_adapters_without_a_template_are_refused():
    model = tiny("llama")
    prompt = inlay.attach(model, inlay.Prompt(length=2), "prompt")
    both = inlay.attach(model, inlay.PTuning(encoder="mlp") + inlay.Prompt(length=2), "both")
    with pytest.raises(MethodError, match="needs an adapter with a PTuning part"):
        inlay.fill_template(prompt, tokenizer(), [{"text": "a"}])
    with pytest.raises(MethodError, match="other virtual tokens"):
        inlay.fill_template(both, tokenizer(), [{"text": "a"}])
