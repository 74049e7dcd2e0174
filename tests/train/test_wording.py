"""Classes as words of a language model, from the configuration to predictions; words that prompts start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.config_loading import load
from inlay.data.encode_template import TemplateEncoder, Wording
from inlay.data.rows import Labelled
from inlay.errors import ConfigError, DataError
from inlay.train import models
from inlay.train.loss import word_scores
from inlay.train.run import Result, train
from inlay.train.trained import open_trained
from inlay.train.wording import words_of
from tiny import VOCAB, batch, tiny
from train.worlds import COLOURS, data_file, model_folder, tokenizer

FAST = {"max_steps": 3, "eval_steps": 3, "per_device_train_batch_size": 8, "bf16": False}
WORDS = {"red": "cat", "green": ["dog", "bird"], "blue": "fish"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wording")
    model_folder(folder / "masked", "bert", "mlm")
    model_folder(folder / "bare", "bert", "cls")
    model_folder(folder / "causal", "llama")
    data_file(folder / "rows.jsonl", "labelled")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(world: Path, model: str, output: str, **keys: Any) -> Result:
    settings = FAST | {"model": str(world / model), "data": str(world / "rows.jsonl"), "output_dir": output}
    return train(load(None, [], settings | keys), quiet=True)


def test_scores_are_those_of_the_verbalizer():
    model = tiny("bert", "mlm")
    verbalizer = inlay.Verbalizer(WORDS, tokenizer("bert"))
    inputs = batch(model, labels=False)
    inputs["input_ids"][:, 1] = verbalizer.mask_id
    logits = model(**inputs).logits
    at = verbalizer.positions(inputs)
    ids = torch.tensor([[*ids, -1][:2] for ids in verbalizer.ids]).repeat(len(at), 1, 1)
    torch.testing.assert_close(word_scores(logits, at, ids), verbalizer.scores(logits, inputs))


CASES = [
    ("masked", "lora", "{text} is {mask} .", {}),
    ("masked", {"name": "ptuning", "encoder": "mlp"}, "{prompt:2} {mask} {prompt:1} {text} {prompt:1}", {}),
    ("causal", {"name": "ptuning", "encoder": "mlp"}, "{prompt:2} {text} : {prompt:2}", {}),
    ("causal", {"name": "prompt", "length": 4}, "{text} is", {"init_text": "the red cat"}),
]


@pytest.mark.parametrize(("model", "method", "template", "keys"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_language_model_classifies_with_its_words(world, model, method, template, keys):
    result = run(world, model, "run", method=method, template=template, verbalizer=WORDS, **keys)
    (ours,) = (metrics for name, metrics in result.results.items() if name != "untouched")
    assert {"accuracy", "macro_f1"} <= set(ours)
    assert "head only" not in result.results
    trained = open_trained("run")
    again = next(iter(trained.evaluate().values()))
    assert again == pytest.approx(ours, abs=1e-5)
    assert "accuracy" in next(iter(trained.evaluate_base().values()))
    said = list(trained.predict(["a red cat is on the tree", "the blue dog"], top=3))
    assert all(row["label"] in COLOURS and set(row["top"]) == set(COLOURS) for row in said)
    assert not any("head" in name for name in trained.adapter.stored())
    assert f"AutoModelFor{'MaskedLM' if model == 'masked' else 'CausalLM'}" in Path("run/README.md").read_text()


def test_prompts_trained_apart_answer_together(world):
    keys = {
        "method": {"name": "ptuning", "encoder": "mlp"},
        "learning_rate": 0.1,
        "template": "{prompt:2} {text} {mask}",
    }
    for seed in (1, 2, 3):
        run(world, "masked", f"run{seed}", seed=seed, verbalizer=WORDS, **keys)
    texts = [json.loads(line)["text"] for line in (world / "rows.jsonl").read_text().splitlines()]
    alone = [[row["label"] for row in open_trained(f"run{seed}").predict(texts)] for seed in (1, 2, 3)]
    three = open_trained("run1", others=["run2", "run3/adapter"])
    for labels, row in zip(zip(*alone, strict=True), three.predict(texts), strict=True):
        most = max(labels.count(label) for label in labels)
        assert labels.count(row["label"]) == most
        assert row["score"] == pytest.approx(most / 3, abs=2e-3)
    assert "loss" not in next(iter(three.evaluate().values()))
    assert "loss" in next(iter(open_trained("run1", others=["run2"], vote="mean").evaluate().values()))
    run(world, "masked", "other", template="{text} {mask}", verbalizer=WORDS)
    with pytest.raises(ConfigError, match="another template, verbalizer or other classes"):
        open_trained("run1", others=["other"])


@pytest.mark.parametrize(
    ("model", "keys", "told"),
    [
        ("masked", {"template": "{text}"}, "0 places for the answer"),
        ("causal", {"template": "{text} {mask}"}, "{mask} is for masked language models"),
        ("masked", {"template": "{prompt:2} {text} {mask}"}, "trained by the method ptuning, not by LoRA"),
        ("masked", {"template": "{text} {mask}", "method": "ptuning"}, "write {prompt:3} where 3"),
        (
            "masked",
            {"template": "{text} {mask}", "verbalizer": {"red": "cat", "pink": "dog"}},
            "no words for ['blue', ",
        ),
        ("masked", {"template": "{text} {mask}", "init_text": "a"}, "only prompts and prefixes start from words"),
        ("masked", {"template": "{text} {mask}", "init_classes": True}, "only the method prompt"),
        ("bare", {"template": "{text} {mask}"}, "has no language-model head"),
    ],
)
def test_words_that_cannot_be_right_are_told_and_leave_nothing(world, model, keys, told):
    with pytest.raises(ConfigError) as caught:
        run(world, model, "run", **({"verbalizer": WORDS} | keys))
    assert told in str(caught.value)
    assert not Path("run").exists()


def test_a_word_is_written_as_it_stands_in_the_text():
    class Blanks:
        """Keeps blanks: `cat` and ` cat` are two words of the vocabulary."""

        mask_token, mask_token_id, unk_token_id = None, None, 0
        words = ("?", "cat", " cat", "dog", " dog")

        def __call__(self, word: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [self.words.index(word)]}

    config = load(
        None, [], {"model": "m", "data": "d", "template": "{text} is", "verbalizer": {"a": "cat", "b": "dog"}}
    )
    with pytest.raises(ConfigError, match="after a blank, and this tokenizer keeps blanks: write ' cat' instead"):
        words_of(config, Blanks(), ["a", "b"])
    right = config.model_copy(update={"verbalizer": {"a": " cat", "b": " dog"}})
    assert words_of(right, Blanks(), ["b", "a"]).ids == ((4,), (2,))


def test_rows_in_a_template():
    roles = {"text": "sentence", "text_pair": "other", "label": "label"}
    tok = tokenizer("bert")
    encoder = TemplateEncoder(tok, 12, Wording("{prompt:2} {sentence} [MASK] {text_pair}", VOCAB, False), roles)
    ((one,), (two,)) = encoder([Labelled("the red cat", "a tree", "x"), Labelled("a a a a a a a", "the", "y")])
    assert one.input_ids[:3] == [1, VOCAB, VOCAB + 1]
    assert tok.convert_ids_to_tokens(one.input_ids[3:]) == ["the", "red", "cat", "[MASK]", "a", "tree", "[SEP]"]
    assert (len(two.input_ids), two.cut, two.input_ids.count(tok.mask_token_id)) == (12, 1, 1)
    assert (one.labels, two.labels, one.references) == ([0], [1], ["x"])
    with pytest.raises(DataError, match=r"leaves out \{text_pair\}, column 'other'"):
        TemplateEncoder(tok, 9, Wording("{text} [MASK]", VOCAB, False), roles)
    with pytest.raises(DataError, match=r"has a field \{txt\}.*did you mean 'text'"):
        TemplateEncoder(tok, 9, Wording("{txt} [MASK]", VOCAB, False), roles)


def test_a_prefix_starts_from_words_and_a_prompt_from_the_classes(world):
    prefix = {"name": "prefix", "length": 3, "mid": None}
    run(world, "bare", "prefix", method=prefix, init_text="the red cat", learning_rate=1e-12, baseline=False)
    model = tiny("bert", "cls")
    adapter = inlay.attach(model, inlay.Prefix(length=3, mid=None))
    inlay.init_prefix_from_words(adapter, tokenizer("bert")("the red cat", add_special_tokens=False)["input_ids"])
    stored = open_trained("prefix").adapter.stored()
    for name, tensor in adapter.stored().items():
        if "head" not in name:
            torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-4)
    run(world, "bare", "classes", method={"name": "prompt", "length": 4}, init_classes=True, baseline=False)
    method = open_trained("classes").adapter.method
    assert method.class_ids == tuple((tokenizer("bert").convert_tokens_to_ids(c),) for c in sorted(COLOURS))


def test_the_models_positions_limit_texts(world, tmp_path):
    config = models.load_config(load(None, [], {"model": str(world / "masked"), "data": "d"}))
    assert models.positions_of(config) == 64
    assert models.positions_of(tiny("roberta").config) == 64 - 1 - 1
    assert models.positions_of(tiny("t5").config) is None
    assert models.rotates(tiny("llama").config)
    assert not models.rotates(tiny("bert").config)
    tok = tokenizer("bert")
    tok.model_max_length = 10**6
    tiny("bert", "cls").save_pretrained(tmp_path / "long")
    tok.save_pretrained(tmp_path / "long")
    long = {"text": "red cat " * 60, "label": "red"}
    rows = [long, *({"text": f"a {c} cat", "label": c} for c in COLOURS * 4)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data": "long.jsonl", "baseline": False}
    run(tmp_path, "long", "run", **keys, method={"name": "prompt", "length": 5})
    assert json.loads(Path("run/data.json").read_text())["max_length"] == 59
    with pytest.raises(DataError, match="max_length is 65, and the model has 64 positions"):
        run(tmp_path, "long", "other", **keys, max_length=65)
