"""The run configuration: every source, every kind of mistake, all mistakes at once, and nothing heavy imported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.config import ALIASES, RunConfig, key_table
from inlay.config_loading import build_method, dump, load, method_name
from inlay.errors import ConfigError

MINIMAL = ["model=m", "data=d"]


def told(path: Path | None = None, words: list[str] | None = None, **flags: object) -> str:
    """The message of the error that a configuration gives."""
    with pytest.raises(ConfigError) as caught:
        load(path, words or [], flags)
    return str(caught.value)


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nlearning_rate: 1e-4\nseed: 1\nmax_steps: 5\n")
    config = load(file, ["seed=2", "--max-steps", "6"], {"seed": 3, "task": None})
    assert (config.learning_rate, config.seed, config.max_steps, config.task) == (1e-4, 3, 6, None)


def test_every_mistake_is_told_at_once_with_its_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\n"
        "lr: 1e-4\n"
        "learning_rate: fast\n"
        "num_epoch: 3\n"
        "bf16: yes\n"
        "per_device_train_batch_size: 0\n"
        "lr_scheduler_type: cosin\n"
        "warmup_ratio: 0.1\n"
        "warmup_steps: 5\n"
    )
    message = told(file, ["seed=1.5", "stray"])
    for part in (
        "10 problems",
        "data: is required and was not given",
        f"{file}:2  lr: unknown key; did you mean 'learning_rate'?",
        f"{file}:3  learning_rate: expected a number, got 'fast'",
        f"{file}:4  num_epoch: unknown key; did you mean 'num_train_epochs'",
        f"{file}:5  bf16: expected true or false, got 'yes'",
        f"{file}:6  per_device_train_batch_size: must be greater than or equal to 1, got 0",
        f"{file}:7  lr_scheduler_type: expected one of linear",
        "did you mean 'cosine'",
        f"{file}:9  warmup_steps: warmup_ratio is set too",
        "'seed=1.5': expected a whole number, got 1.5",
        "stray: is neither a key=value nor a flag",
    ):
        assert part in message, f"{part!r} not in\n{message}"


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("cutoff_len", "max_length"),
        ("lora_r", "method.rank"),
        ("target_modules", "method.sites"),
        ("load_in_4bit", "quantization"),
    ],
)
def test_names_of_other_tools_are_offered_never_taken(other, ours):
    assert told(None, [*MINIMAL, f"{other}=1"]) == f"'{other}=1': unknown key; did you mean '{ours}'?"


def test_aliases_lead_to_keys_and_hide_none():
    for other, ours in ALIASES.items():
        assert other not in RunConfig.model_fields
        assert ours.split(".")[0] in RunConfig.model_fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected lines of the form `key: value`"),
        ("- a\n- b\n", "holds a list; expected lines"),
        ("just words\n", "holds a str"),
        ("model: m\nmodel: n\n", ':2: found duplicate key "model"'),
        ("model: [m\n", ":2: "),
        ("model: m\n\tdata: d\n", ":2: "),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert f"{file}" in told(file)
    assert message in told(file)


def test_a_missing_file():
    assert told(Path("nowhere.yaml")) == "nowhere.yaml: there is no such file"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["bf16=true", "fp16=true"], "fp16"),
        (["max_steps=0"], "max_steps"),
        (["eval_fraction=0", "early_stopping_patience=3"], "early_stopping_patience"),
        (["eval_fraction=0", "metric_for_best_model=f1"], "metric_for_best_model"),
        (["double_quant=true"], "double_quant"),
        (["allow_changed=true"], "allow_changed"),
        (["packing=true", "task=seq2seq"], "packing"),
        (["report_to=none,wandb"], "report_to"),
    ],
)
def test_contradictions(words, key):
    assert told(None, [*MINIMAL, *words]).startswith((f"'{key}=", f"{key}: "))


def test_yaml_is_of_version_1_2(tmp_path):
    """`1e-4` is a number and `no` is a word, as nobody but PyYAML's users would doubt."""
    file = tmp_path / "run.yaml"
    file.write_text("model: no\ndata: d\nlearning_rate: 1e-4\n")
    config = load(file)
    assert (config.model, config.learning_rate) == ("no", 1e-4)


def test_flags_switches_and_words():
    config = load(
        None, ["--model", "m", "--data=d", "--no-packing", "--gradient-checkpointing", "max-steps=3", "--bf16"][:5]
    )
    assert (config.packing, config.gradient_checkpointing) == (False, True)
    assert load(None, [*MINIMAL, "--bf16", "--seed", "7"]).bf16 is True


def test_columns_and_trackers_as_users_write_them():
    config = load(
        None, [*MINIMAL, "--columns", "prompt=question,completion=answer", "--report-to", "wandb,tensorboard"]
    )
    assert config.columns == {"prompt": "question", "completion": "answer"}
    assert config.report_to == ["wandb", "tensorboard"]


@pytest.mark.parametrize(
    "words", [["--method", "lora", "--method.rank", "4"], ["method.rank=4"], ["method={name: lora, rank: 4}"]]
)
def test_settings_below_method(words):
    method = build_method(load(None, [*MINIMAL, *words]).method)
    assert (type(method).__name__, method.rank) == ("LoRA", 4)


def test_a_method_flag_keeps_the_settings_beside_it():
    config = load(None, [*MINIMAL, "--method.rank", "4"], {"method": "lora"})
    assert config.method == {"name": "lora", "rank": 4}


def test_another_method_drops_the_settings_of_the_former(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nmethod:\n  name: lora\n  rank: 4\n")
    assert load(file, ["method=bitfit"]).method == "bitfit"
    assert load(file, ["method.rank=8"]).method == {"name": "lora", "rank": 8}


def test_wrong_settings_of_a_method_are_told_with_the_rest(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nmethod:\n  name: lora\n  rnak: 4\n  alpha: loud\nepochs: 2\n")
    message = told(file)
    assert f"{file}:5  method.rnak: unknown key; did you mean 'rank'? (a setting of LoRA)" in message
    assert f"{file}:6  method.alpha: expected a number or a mapping, got 'loud' (a setting of LoRA)" in message
    assert f"{file}:7  epochs: unknown key" in message


def test_an_unknown_method():
    assert "'method=lroa': unknown method 'lroa'; did you mean 'lora'" in told(None, [*MINIMAL, "method=lroa"])


def test_a_list_of_methods_is_a_mix():
    setting = [{"name": "lora", "rank": 4}, "bitfit"]
    assert [type(part).__name__ for part in build_method(setting).parts] == ["LoRA", "BitFit"]
    assert method_name(setting) == "lora+bitfit"


def test_a_typo_is_told_before_anything_heavy_is_imported():
    code = (
        "import sys\n"
        "from inlay.config_loading import load\n"
        "from inlay.errors import ConfigError\n"
        "try: load(None, ['model=m', 'data=d', 'method=lora', 'lr=1'])\n"
        "except ConfigError: print({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_dumped_is_read_back_equal(tmp_path):
    config = load(
        None, [*MINIMAL, "learning_rate=3e-4", "columns=a=b", "method={name: lora, rank: 3}", "eval_data=[x, y]"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config


@given(st.dictionaries(st.sampled_from(sorted(RunConfig.model_fields)), st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(allow_nan=False), st.text(max_size=8),
    st.lists(st.text(max_size=3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
).filter(lambda v: v != "lroa"), max_size=6))  # fmt: skip
def test_no_value_escapes_as_another_exception(values):
    flags = {key: value for key, value in values.items() if key != "method"}
    with contextlib.suppress(ConfigError):
        load(None, MINIMAL, flags)


def test_every_key_says_what_it_means():
    for key, kind, _, meaning in key_table():
        assert kind, key
        assert len(meaning) > 10, key
