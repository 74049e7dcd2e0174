"""The learning rate of a new task head, which starts from noise beside a base and adapter that start from something.

An AdamW step moves every weight by about its rate, so a step moves a logit w · x by about rate × |x|₁, whatever the
loss. How large the features x are differs between bases by a factor of a hundred (the pooled output of MiniLM sums to
21, a decoder's normalized state of width 4096 to some thousands), hence no one rate suits them, and the rates of
methods say nothing about it: with LoRA's, a head on MiniLM is still near its noise when the run ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_PER_STEP = 1.0
"""How far one step may move a logit. `benchmarks/learning-rates-2026-11-22.md`: rates around it on three data sets."""
LARGEST = 0.1


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """The modules of the task head, where the model's head is of the kind that is new for each task."""
    import inlay

    found = inlay.anatomy(model)
    return tuple(dict.fromkeys(site.leave for site in found.select("head"))) if found.new_head and found.head else ()


def head_parameters(adapter: Any) -> Iterator[nn.Parameter]:
    """What an adapter trains of the task head itself, whichever of its methods keeps the copy."""
    from inlay.methods.base import Replacement

    paths = head_paths(adapter.model)
    for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True):
        if site.leave in paths and isinstance(piece, Replacement):
            yield from piece.parameters()


def head_learning_rate(model: nn.Module, new: Sequence[str], inputs: Mapping[str, Tensor]) -> float | None:
    """`LOGITS_PER_STEP` / mean |x|₁, over the rows and tokens x that enter the head, to two digits.

    Of a head of several layers the lowest of their rates. What counts is the base alone, without adapters, so that a
    resumed run finds the same.

    Args:
        model: with its head; adapters may be attached.
        new: paths of modules whose weights no checkpoint had.
        inputs: one batch.

    Returns:
        None where no module of the head is new, or none was called.
    """
    import inlay

    paths = [p for p in head_paths(model) if any(p == name or p.startswith(f"{name}.") for name in new)]
    sums: list[float] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            sums.append(float(args[0].detach().float().abs().sum(-1).mean()))

    if not paths:
        return None
    handles = [model.get_submodule(path).register_forward_pre_hook(look) for path in paths]
    base = inlay.use(model, None) if inlay.adapters(model) else nullcontext()
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), base:
            model(**{name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not sums or max(sums) == 0:
        return None
    return float(f"{min(LARGEST, LOGITS_PER_STEP / max(sums)):.2g}")
