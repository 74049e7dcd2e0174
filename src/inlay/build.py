"""From a method and an anatomy to the pieces of one adapter, before anything in the model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from inlay.anatomy import Anatomy, Site
from inlay.anatomy.probe import modules_of
from inlay.methods.base import Frozen, Method, Piece
from inlay.methods.full import Copy, Full

HEAD = "head"

Built = list[tuple[str, Piece, Site]]


def heads(found: Anatomy, head: Literal["auto"] | str | Sequence[str] | None) -> list[Site]:
    """The leaves of the task head that the adapter keeps a trained copy of."""
    if head is None or (head == "auto" and not found.new_head):
        return []
    if head == "auto":
        return found.select("head")
    wanted = [head] if isinstance(head, str) else list(head)
    # A head may be called what other modules end in, or as a semantic name ("norm").
    own = [s for s in found.select("head") if s.leave in wanted] if found.head else []
    named = {s.leave for s in own}
    rest = [h for h in wanted if h not in named]
    inside = [p for p in found.leaves for h in rest if p.startswith(h + ".")]
    direct = [h for h in rest if not any(p.startswith(h + ".") for p in found.leaves)]
    return own + (found.select([*dict.fromkeys(inside), *direct]) if inside or direct else [])


def build(model: nn.Module, method: Method, found: Anatomy, at_heads: list[Site]) -> Built:
    """All pieces, before anything in the model is touched: a refusal here leaves no trace."""
    modules, memo = dict(modules_of(model)), dict[int, Any]()
    tags: dict[str, int] = {}
    built: Built = []
    replaced: set[str] = set()
    for part in method.parts:
        tags[part.tag] = tags.get(part.tag, 0) + 1
        tag = part.tag if tags[part.tag] == 1 else f"{part.tag}_{tags[part.tag]}"
        sites = part.select(found)
        shared = part.shared(sites)
        pieces: list[tuple[Site, Piece]] = []
        for site in sites:
            frozen = Frozen(modules[site.leave], memo, site.leave)
            with torch.device(_device(modules, site)):
                piece = part.build(site, frozen, shared)
            pieces.append((site, piece))
            built.append((_key(tag, site), piece, site))
            if isinstance(piece, Copy):
                replaced.add(site.leave)
        part.finish(pieces)
    for site in at_heads:
        if site.leave not in replaced:
            built.append((HEAD, Copy(Frozen(modules[site.leave], memo, site.leave)), site))
    if any(isinstance(part, Full) and part.sites is None and part.layers is None for part in method.parts):
        _tell_what_full_leaves(model, {site.leave for _, _, site in built})
    return _distinct(built)


def _tell_what_full_leaves(model: nn.Module, copied: set[str]) -> None:
    """Modules are copied, so a tensor that a module holds beside its children (a state-space layer's decay, a class
    token) stays frozen.
    """
    modules = dict(modules_of(model))
    trained = {id(p) for path in copied for p in modules[path].parameters()}
    left = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in trained and parameter.is_floating_point() and ".inlay." not in name
    }
    if left:
        largest = max(left, key=lambda name: left[name])
        warnings.warn(
            f"Full leaves {sum(left.values()):,} parameters frozen, in {len(left)} tensors that modules hold beside "
            f"their children, the largest {largest}: it trains whole modules, and these are in none.",
            stacklevel=4,
        )


def _device(modules: dict[str, nn.Module], site: Site) -> torch.device:
    """Where a span's weights are; the module it leaves at may have none (a dropout)."""
    tensors = (p for path in (site.leave, site.enter) if path in modules for p in modules[path].parameters())
    tensor = next(tensors, None)
    return torch.device("cpu") if tensor is None else tensor.device


def _key(tag: str, site: Site) -> str:
    key = tag if not site.fused else f"{tag}_{site.name.rsplit('.', 1)[-1]}"
    return key if site.tap != "input" else f"{key}_in"


def _distinct(built: Built) -> Built:
    """Two pieces of one adapter at one module get different keys, in a stable order."""
    seen: dict[tuple[str, str], int] = {}
    out: Built = []
    for key, piece, site in built:
        n = seen[site.leave, key] = seen.get((site.leave, key), 0) + 1
        out.append((key if n == 1 else f"{key}_{n}", piece, site))
    return out
