"""Where adapters can go: `anatomy(model)` finds it by running the model once on a few tokens."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from inlay.anatomy.assemble import assemble, structural
from inlay.anatomy.base import Anatomy, Site
from inlay.anatomy.probe import modules_of, trace

__all__ = ["Anatomy", "Site", "anatomy"]

_known: weakref.WeakKeyDictionary[nn.Module, tuple[int, Anatomy]] = weakref.WeakKeyDictionary()


def anatomy(model: nn.Module, example: Mapping[str, Any] | None = None) -> Anatomy:
    """The sites of a model: attentions, projections, feed-forward spans, norms, embeddings, head.

    The model runs once on a few tokens, without gradients for its parameters, and is left as it was. The result is
    remembered until the model's modules change.

    Args:
        model: any transformers model, or any module if `example` is given.
        example: keyword arguments of one forward pass, for a model that takes something other than token ids.

    Returns:
        An `Anatomy`. Where the run failed or showed no attention, `problem` says why; module paths still select.
    """
    signature = hash(tuple((path, id(module)) for path, module in modules_of(model)))
    if example is None and model in _known and _known[model][0] == signature:
        return _known[model][1]
    try:
        record = trace(model, example)
    except Exception as error:
        found = structural(model, f"the model could not be run on a few tokens ({type(error).__name__}: {error})")
        if example is not None:
            # A mistaken example says nothing about the model, so it is not remembered.
            return found
    else:
        with torch.random.fork_rng(devices=[]):
            found = assemble(model, record)
    _known[model] = signature, found
    return found


class _CallableModule(ModuleType):
    """This package, callable: `inlay.anatomy` is the function as well as the package that bears its name."""

    def __call__(self, model: nn.Module, example: Mapping[str, Any] | None = None) -> Anatomy:
        return anatomy(model, example)


sys.modules[__name__].__class__ = _CallableModule
