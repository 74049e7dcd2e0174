"""Verbs and flags are a promise: scripts call them. A change here is a change for every user."""

from __future__ import annotations

import sys

import pytest
import typer.main

from inlay import cli
from inlay.config import RunConfig

FLAGS = {
    "train": "--model --data --eval-data --method --task --columns --output-dir --resume --allow-changed --quiet --json"
    " --keys",
    "eval": "RUN --data --adapter --base --with --vote --cpu --json",
    "predict": "RUN [FILE] --text --pair --top --output --adapter --with --vote --cpu --json",
    "generate": "RUN [FILE] --prompt --max-new-tokens --num-beams --sample --temperature --top-p --seed --output"
    " --adapter --cpu --json",
    "export": "RUN [OUTPUT] --to --dtype --adapter --cpu",
    "data": "FILE... --model --task --columns --max-length --rows --start --on-bad-row --picture",
    "plan": "--model --method --base --gpu --batch --length --target-length --task --checkpointing --optim --device"
    " --revision --picture --json",
    "inspect": "MODEL --task --sites --revision",
    "methods": "[NAME] --json",
    "sweep": "--random --seed --together --output-dir --quiet --json",
    "demo": "--method --steps --output-dir --json",
}

KEYS = """
model data eval_data eval_fraction columns task max_length packing weights streaming group_by_length on_bad_row method
template verbalizer init_text init_classes
output_dir resume allow_changed revision dtype attn_implementation quantization double_quant trust_remote_code
learning_rate head_learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps warmup_ratio warmup_steps lr_scheduler_type lr_scheduler_kwargs weight_decay max_grad_norm
optim adam_beta1 adam_beta2 adam_epsilon loraplus_lr_ratio label_smoothing_factor bf16 fp16 gradient_checkpointing
fsdp torch_compile seed logging_steps eval_steps save_steps save_total_limit metric_for_best_model greater_is_better
load_best_model_at_end early_stopping_patience early_stopping_threshold baseline eval_samples generation_metrics
generation_eval_rows generation_max_new_tokens generation_num_beams report_to use_cpu
"""


@pytest.mark.parametrize("verb", FLAGS)
def test_arguments_and_flags(verb):
    command = typer.main.get_command(cli.build(verb)).commands[verb]
    found = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
            found.append(name if parameter.required else f"[{name}]")
        elif parameter.name != "help":
            found.append(parameter.opts[0])
    assert found == FLAGS[verb].split()


def test_no_verb_is_missing():
    assert set(FLAGS) <= set(cli.verbs())


def test_keys_of_the_run_configuration():
    assert list(RunConfig.model_fields) == KEYS.split()


def test_without_the_training_packages_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ruamel", None)
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    monkeypatch.setattr(sys, "argv", ["inlay", "train", "--model", "m", "--data", "d.csv", "learning_rate=1e-4"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'inlay[train]'" in capsys.readouterr().err
