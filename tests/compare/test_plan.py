"""Which runs a comparison consists of, and what is refused before any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlay.compare.plan import Plan, Variant, sizes_of, template_of, variants_of
from inlay.errors import ConfigError
from inlay.methods.base import methods

TEMPLATE = template_of(["max_length=32"], {"model": "m", "data": "d.jsonl", "max_steps": 7})


def plan(**changes: object) -> Plan:
    values = {"template": TEMPLATE, "variants": variants_of("lora,bitfit"), "seeds": (1, 2), "output": Path("out")}
    return Plan(**(values | changes))  # type: ignore[arg-type]


def test_cells_are_the_whole_grid_with_all_data_first():
    cells = list(plan(sizes=(100, None, 10)).cells())
    assert [(c.variant.label, c.size, c.seed) for c in cells[:4]] == [
        ("LoRA", None, 1), ("BitFit", None, 1), ("LoRA", None, 2), ("BitFit", None, 2),
    ]  # fmt: skip
    assert [c.size for c in cells[4:]] == [100] * 4 + [10] * 4
    assert len({c.name for c in cells}) == len(cells) == 12


def test_a_cell_has_the_template_and_what_is_its_own():
    variant = Variant("x", {"name": "lora", "rank": 3}, {"learning_rate": 0.5})
    one = plan(variants=(variant,), sizes=(100,), seeds=(4,))
    config = one.config(next(one.cells()), "folder")
    assert (config.data, config.seed, config.max_steps, config.max_length) == ("folder#100", 4, 7, 32)
    assert (config.method, config.learning_rate) == ({"name": "lora", "rank": 3}, 0.5)
    assert not config.baseline
    assert not config.load_best_model_at_end


def test_small_samples_are_passed_over_more_often_where_the_length_is_in_epochs():
    epochs = plan(template=template_of([], {"model": "m", "data": "d.jsonl"}), sizes=(None, 50))
    lengths = {cell.size: epochs.config(cell, "d.jsonl").num_train_epochs for cell in epochs.cells()}
    assert lengths == {None: 3.0, 50: 20.0}


def test_without_names_every_method_is_compared_full_fine_tuning_first():
    variants = variants_of("")
    assert {v.key for v in variants} == set(methods())
    assert [v.key for v in variants[:2]] == ["full", "headonly"]
    assert len({v.label for v in variants}) == len(variants)
    assert {"MAM", "UniPELT", "Parallel adapter"} < {v.label for v in variants}


def test_methods_take_settings_and_mixes():
    rank, mix = variants_of("lora:rank=4:alpha=8, lora+prefix:length=3")
    assert (rank.label, rank.method) == ("LoRA rank=4 alpha=8", {"name": "lora", "rank": 4, "alpha": 8})
    assert mix.method == ["lora", {"name": "prefix", "length": 3}]
    assert mix.key == "lora+prefix"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("loral", "did you mean 'lora'"),
        ("lora:rank", "key=value"),
        ("lora:rnk=4", "rnk"),
        ("bottleneck:size=4:reduction=2", "not both"),
    ],
)
def test_a_wrong_method_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        variants_of(words)


@pytest.mark.parametrize("text", ["many", "1.5", "", "-3"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="sizes"):
        sizes_of(text)
    assert sizes_of("all, 100,100") == (None, 100)


@pytest.mark.parametrize("word", ["seed=3", "method=lora", "output_dir=x", "load_best_model_at_end=true"])
def test_keys_that_the_comparison_decides_are_refused(word):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        template_of([word], {"model": "m", "data": "d"})


def test_what_cannot_be_told_apart_or_sampled_is_refused():
    with pytest.raises(ConfigError, match="one name"):
        plan(variants=(Variant("a", "lora"), Variant("A", "bitfit")))
    with pytest.raises(ConfigError, match="sizes"):
        plan(sizes=(1,))
    with pytest.raises(ConfigError, match="several"):
        plan(template=template_of([], {"model": "m", "data": ["a", "b"]}), sizes=(None, 9))


def test_a_wrong_method_is_told_in_words() -> None:
    with pytest.raises(ConfigError) as told:
        variants_of("lora,foo")
    assert str(told.value).startswith("method: unknown method 'foo'; known: adalora, ")
