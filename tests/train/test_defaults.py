"""Every method has settings of its own, and whatever a user says wins over them."""

from __future__ import annotations

import pytest

import inlay
from inlay.config import RunConfig
from inlay.methods.base import methods
from inlay.train.defaults import SCALED, TABLE, defaults, kind_of, resolve_method, resolve_steps, width_of


def test_every_method_is_in_the_table_and_nothing_else_is():
    assert set(TABLE) == set(methods())


def test_a_mix_takes_the_most_careful_part():
    assert defaults("lora+full", "regression") == TABLE["full"]["understanding"]
    assert defaults("lora+prefix", "causal-lm") == TABLE["lora"]["generation"]


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_texts_are_learnt_with_other_settings_than_classes(task):
    assert kind_of(task) == "generation"
    assert defaults("lora", task) != defaults("lora", "sequence-classification")


def test_a_wide_scaled_bottleneck_learns_slowly():
    wide = inlay.Bottleneck.scaled_parallel().spec()
    entry = {"name": wide.pop("method"), **wide}
    assert defaults(entry, "regression") == defaults([entry, "prompt"], "regression") == SCALED["understanding"]
    assert defaults(entry | {"scale": 1.0}, "regression") == TABLE["bottleneck"]["understanding"]
    resolved = resolve_method(RunConfig(model="m", data="d", method=entry), "bottleneck", "regression")
    assert (
        resolved.learning_rate
        == SCALED["understanding"].learning_rate
        < TABLE["bottleneck"]["understanding"].learning_rate
    )


@pytest.mark.parametrize("name", ["prefix", "ptuningv2"])
def test_a_prefix_made_by_an_mlp_learns_more_slowly(name):
    for task in ("regression", "causal-lm"):
        direct, made = defaults({"name": name, "mid": None}, task), defaults({"name": name, "mid": 64}, task)
        assert direct == defaults(name, task)
        assert made.learning_rate < 0.1 * direct.learning_rate


def test_a_head_alone_that_was_given_a_rate_has_it():
    said = RunConfig(model="m", data="d", method="headonly", learning_rate=0.3)
    assert resolve_method(said, "headonly", "regression").head_learning_rate == 0.3
    assert resolve_method(said, "lora", "regression").head_learning_rate is None


def test_tags_are_learnt_more_slowly_than_classes():
    assert defaults("lora", "token-classification").learning_rate < defaults("lora", "regression").learning_rate
    assert defaults("bitfit", "token-classification") == defaults("bitfit", "regression")


def test_rates_go_with_the_width_of_the_model():
    def rate(method, task, width):
        return defaults(method, task, width).learning_rate

    assert rate("lora", "regression", 384) == TABLE["lora"]["understanding"].learning_rate
    assert rate("lora", "causal-lm", 2000) == TABLE["lora"]["generation"].learning_rate
    # LLaMA-7B, 13B and 65B had 2e-4, 2e-4 and 1e-4 in the QLoRA paper
    assert rate("lora", "causal-lm", 4096) == 2.9e-4
    assert rate("lora", "causal-lm", 8192) == 1.7e-4
    assert rate("lora", "regression", 1024) == 9.3e-4
    assert rate("lora", "causal-lm", 128) == rate("lora", "causal-lm", 32) == 4.3e-3
    assert rate("lora", "regression", 32) == rate("lora", "regression", 384)
    config = RunConfig(model="m", data="d")
    assert resolve_method(config, "full", "causal-lm", 4096).learning_rate == 2.9e-5
    assert resolve_method(config.model_copy(update={"learning_rate": 1.0}), "full", "causal-lm", 128).learning_rate == 1


def test_the_width_of_a_model_is_that_of_its_text():
    import transformers

    assert width_of(transformers.T5Config(d_model=48)) == 48
    assert width_of(transformers.GPT2Config(n_embd=96)) == 96
    assert width_of(transformers.BertConfig(hidden_size=24)) == 24


def test_what_is_said_wins():
    said = RunConfig(
        model="m", data="d", learning_rate=1.0, per_device_train_batch_size=3, warmup_steps=0, weight_decay=0.5,
        lr_scheduler_type="constant",
    )  # fmt: skip
    resolved = resolve_method(said, "lora", "regression")
    assert resolved == said.model_copy(update={"task": "regression"})
    silent = resolve_method(RunConfig(model="m", data="d"), "full", "regression")
    chosen = TABLE["full"]["understanding"]
    assert (silent.learning_rate, silent.weight_decay) == (chosen.learning_rate, chosen.weight_decay)
    assert (silent.warmup_ratio, silent.warmup_steps) == (chosen.warmup_ratio, None)


@pytest.mark.parametrize(
    ("keys", "total", "held_out", "expected"),
    [
        ({}, 1000, True, (10, 200, 200)),
        ({}, 7, True, (1, 2, 2)),
        ({}, 1000, False, (10, None, 200)),
        ({"eval_steps": 30}, 1000, True, (10, 30, 30)),
        ({"eval_steps": 30, "save_steps": 5, "logging_steps": 1}, 1000, True, (1, 30, 5)),
    ],
)
def test_how_often(keys, total, held_out, expected):
    resolved = resolve_steps(RunConfig(model="m", data="d", **keys), total, held_out)
    assert (resolved.logging_steps, resolved.eval_steps, resolved.save_steps) == expected


def test_every_resolved_default_is_a_legal_value():
    for name in TABLE:
        for task in ("regression", "causal-lm"):
            resolved = resolve_method(RunConfig(model="m", data="d"), name, task)
            RunConfig(**resolved.model_dump())
