"""The host on an attention module that computes softmax(q kᵀ) v by itself: more keys and values, deltas on the heads.

Such a module calls no function that could be exchanged, so its own code is followed (`inlay.hosts.following`). What
cannot be followed is found out when an adapter is attached, on a few tokens, and refused by name. `torch.compile` runs
such a module as it is, between compiled parts; with `fullgraph=True` it says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inlay.anatomy.base import Site
from inlay.anatomy.examples import candidates
from inlay.anatomy.probe import as_it_was
from inlay.anatomy.tree import modules_of
from inlay.errors import InlayError
from inlay.hosts.attend import Plan, Recording
from inlay.hosts.base import Hosted
from inlay.hosts.extras import Extras
from inlay.hosts.following import Following
from inlay.hosts.keys import KeysHost, input_of


class SoftmaxHost(KeysHost):
    """Serves `ExtraKV` and `HeadDelta` pieces."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen module's result with the active pieces applied."""
        plan = self._inlay.plan
        if plan is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _run(self, plan, super().forward, args, kwargs)  # type: ignore[misc]


@torch.compiler.disable(reason="extra keys follow the scores of an attention that computes them itself")  # type: ignore[untyped-decorator, unused-ignore]
def _run(module: Any, plan: Plan | Recording, frozen: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    site = _site(module._inlay)
    assert site.heads is not None
    x = input_of(args, kwargs)
    if site.rows == "second":
        x = x.transpose(0, 1)
    if site.axis == 1:
        x = x.transpose(1, 2)
    following = Following(module._inlay.path, site.heads, Extras(module, plan, x, site.heads))
    with following:
        result = frozen(*args, **kwargs)
    following.finish()
    return result


def _site(state: Hosted) -> Site:
    return next(placed.site for pieces in state.placed.values() for placed in pieces)


def prove(model: nn.Module) -> None:
    """Runs a model once on a few tokens to see that extra keys can follow every module that was hosted since.

    Raises:
        AttachmentError: one of them does something with its scores that cannot be followed.
    """
    modules = list(modules_of(model))
    new = [m for _, m in modules if isinstance(m, SoftmaxHost) and not m._inlay.proven]
    if not new:
        return
    with contextlib.suppress(TypeError), as_it_was(model, modules), torch.random.fork_rng(devices=[]), torch.no_grad():
        for inputs in candidates(model):
            for module in new:
                module._inlay.plan = Recording()
            try:
                model(**inputs)
            except InlayError:
                raise
            except Exception:
                # These inputs do not suit the model; the forward pass of the user will tell.
                continue
            break
    for module in new:
        module._inlay.proven = True


__all__ = ["SoftmaxHost", "prove"]
