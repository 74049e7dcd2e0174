"""Every method on every family: the settings that make a method small, and what each combination may refuse."""

from __future__ import annotations

import copy
import functools

import torch

import inlay
from inlay.methods.base import methods
from tiny import tiny

DECODERS = {"llama": "causal", "qwen2": "causal", "gpt2": "causal", "opt": "causal"}
ENCODERS = {"bert": "cls", "roberta": "token", "modernbert": "mlm"}
ENCODER_DECODERS = {"t5": "seq2seq", "bart": "seq2seq"}
FAMILIES = DECODERS | ENCODERS | ENCODER_DECODERS

SETTINGS = {
    "adalora": {"init_rank": 3, "target_rank": 1, "total_steps": 20},
    "bottleneck": {"size": 6},
    "diffpruning": {"sites": ("attn.q", "ffn.down")},
    "dora": {"rank": 3},
    "lora": {"rank": 3},
    "mam": {"length": 3, "mid": 8, "size": 6},
    "multihead": {"length": 3},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
    "ptuning": {"template": "{prompt:3} {text}", "encoder": "mlp"},
    "ptuningv2": {"length": 3},
    "unipelt": {"rank": 2, "length": 3, "mid": 8, "reduction": 8},
}
UNCHANGED = {"adalora", "bitfit", "bottleneck", "diffpruning", "dora", "full", "headonly", "ia3", "inlay", "lora"}
BIASLESS, HEADLESS = "BitFit trains biases", "HeadOnly needs a task head"
REFUSED = {
    **{("bitfit", f): BIASLESS for f in ("llama", "t5", "modernbert")},
    **{("headonly", f): HEADLESS for f, task in FAMILIES.items() if task in ("causal", "seq2seq")},
}  # fmt: skip

# The position bias of T5 is one table for all rows, so rows that would train it apart are refused.
UNMIXED = {("full", "t5"): "without the row they belong to"}

CASES = [(name, family) for name in methods() for family in FAMILIES]
WORKING = [case for case in CASES if case not in REFUSED]


def method_of(name: str, **more: object) -> inlay.Method:
    """The method with settings for models 32 wide."""
    return methods()[name](**(SETTINGS.get(name, {}) | more))


@functools.cache
def pristine(family: str) -> torch.nn.Module:
    """The tiny model of a family; copy it."""
    return tiny(family, FAMILIES[family])


def attached(name: str, family: str, adapter: str = "default", **more: object) -> tuple[torch.nn.Module, inlay.Adapter]:
    """A tiny model with a method attached to it."""
    model = copy.deepcopy(pristine(family))
    torch.manual_seed(1)
    return model, inlay.attach(model, method_of(name, **more), name=adapter)
