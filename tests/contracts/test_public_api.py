"""The names under `inlay.` are a promise: each exists, is documented, and none appears or goes unnoticed."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import inlay

PUBLIC = [
    "AdaLoRA",
    "Adapter",
    "Anatomy",
    "BitFit",
    "Bottleneck",
    "Delta",
    "DiffPruning",
    "DoRA",
    "ExtraKV",
    "FP4",
    "Full",
    "HeadDelta",
    "HeadOnly",
    "IA3",
    "Inlay",
    "InlayCallback",
    "Int4",
    "LoRA",
    "MAM",
    "Method",
    "Mix",
    "MultiHead",
    "NF4",
    "PTuning",
    "PTuningV2",
    "Prefix",
    "Prompt",
    "Replacement",
    "Site",
    "Template",
    "UniPELT",
    "Verbalizer",
    "VirtualTokens",
    "__version__",
    "adapters",
    "anatomy",
    "attach",
    "citation",
    "combine",
    "detach",
    "ensemble",
    "ensemble_generate",
    "errors",
    "export_merged",
    "fill_template",
    "init_prefix_from_words",
    "load",
    "load_quantized",
    "plan",
    "quantize",
    "use",
]


def test_public_names_are_pinned():
    assert sorted(inlay.__all__) == PUBLIC
    assert dir(inlay) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(inlay, name)
    assert name == "__version__" or inspect.getdoc(value)
    assert getattr(inlay, name) is value


def test_anatomy_is_a_function_and_still_a_package():
    """Importing the package must not put a plain module in the place of the function of the same name."""
    probe = importlib.import_module("inlay.anatomy.probe")
    assert inlay.anatomy.probe is probe
    assert callable(inlay.anatomy)


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING and the lazy table name the same things from the same modules."""
    tree = ast.parse(Path(inlay.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        alias.name: f"inlay.{alias.name}" if node.module == "inlay" else node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == inlay._HOME


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Lora'"):
        inlay.Lora  # noqa: B018
    assert not hasattr(inlay, "__wrapped__")
