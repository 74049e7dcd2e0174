"""Writing adapters on modules as PEFT folders: LoRA with its variants, AdaLoRA, IA3, with heads and biases.

PEFT has one pair of factors for a module, so several pieces at one module are written as one: ranks are concatenated,
and a part of a fused projection has zeros in the rows of the others. The function is exactly the same.

Legend: R rank, I / O features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Site
from inlay.anatomy.probe import modules_of
from inlay.errors import FormatError
from inlay.formats.peft_folder import Writing, no_format
from inlay.merge import original
from inlay.methods.adalora import AdaLoRA, AdaLoRADelta
from inlay.methods.base import Method, Piece
from inlay.methods.bitfit import BiasDelta
from inlay.methods.dora import DoRADelta
from inlay.methods.full import Copy
from inlay.methods.ia3 import ScaleDelta
from inlay.methods.lora import EmbeddingLoRADelta, LoRADelta, LowRank
from inlay.quant.bridge import logical_shape, weight_of
from inlay.spelling import mapping

if TYPE_CHECKING:
    from inlay.adapter import Adapter

PREFIX = "base_model.model."
Placed = tuple[Site, Piece]
LOW_RANK = (LoRADelta, EmbeddingLoRADelta, DoRADelta)


def write_modules(adapter: Adapter) -> Writing:
    """What to write for an adapter of LoRA, DoRA, AdaLoRA or IA3 pieces, with trained heads and biases.

    Raises:
        FormatError: PEFT's format has no place for something in it.
    """
    modules = dict(modules_of(adapter.model))
    placed = list(zip(adapter.sites, adapter.pieces.values(), strict=True))
    main = [(s, p) for s, p in placed if not isinstance(p, Copy | BiasDelta)]
    biases = [(s, p) for s, p in placed if isinstance(p, BiasDelta)]
    copies = [(s, p) for s, p in placed if isinstance(p, Copy)]
    kinds = {type(p) for _, p in main}
    if not main:
        raise FormatError(
            f"PEFT has no format for {adapter.method!r} by itself (biases, norms, heads, full fine-tuning). Add LoRA, "
            'or save it with format="native".'
        )
    if kinds <= {LoRADelta, EmbeddingLoRADelta} or kinds == {DoRADelta}:
        writing = _lora(adapter.method, main, modules, dora=kinds == {DoRADelta})
    elif kinds == {AdaLoRADelta}:
        writing = _adalora(adapter.method, main, modules)
    elif kinds == {ScaleDelta} and not biases:
        writing = _ia3(main, modules)
    else:
        raise no_format(adapter)
    targets = {site.leave for site, _ in main}
    writing.settings["target_modules"] = _names(targets, modules)
    _add_copies(writing, copies, modules, targets)
    _add_biases(writing, biases, adapter.model, targets, {s.leave for s, _ in copies})
    return writing


def _by_module(placed: Sequence[Placed], modules: dict[str, nn.Module]) -> dict[str, list[Placed]]:
    groups: dict[str, list[Placed]] = {}
    for site, piece in placed:
        if site.enter != site.leave or site.tap == "through":
            raise FormatError(f"PEFT has no place for {site.name!r}, which spans from {site.enter} to {site.leave}.")
        if isinstance(modules[site.leave], nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise FormatError(f"{site.leave} is a convolution, whose tensors PEFT keeps in other shapes.")
        groups.setdefault(site.leave, []).append((site, piece))
    return groups


def _lora(method: Method, main: list[Placed], modules: dict[str, nn.Module], dora: bool) -> Writing:
    rslora = all(part.rslora for part in method.parts if isinstance(part, LowRank))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, group in _by_module(main, modules).items():
        if dora:
            _refuse_overlap(path, group, modules[path])
        A, B, scale = _joined(modules[path], group)
        ranks[path] = A.shape[0]
        alphas[path] = scale * (ranks[path] ** 0.5 if rslora else ranks[path])
        table = isinstance(modules[path], nn.Embedding)
        names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{path}.{names[0]}"], tensors[f"{PREFIX}{path}.{names[1]}"] = A, B
        if dora:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = _magnitude(modules[path], group)
    settings = {"use_dora": dora, "use_rslora": rslora, "lora_dropout": _dropout(method), "lora_bias": False}
    settings |= _pattern("r", "rank_pattern", ranks)
    settings |= _pattern("lora_alpha", "alpha_pattern", {p: _plain(a) for p, a in alphas.items()})
    return Writing("LORA", settings | _defaults(main, modules) | {"init_lora_weights": True}, tensors)


def _refuse_overlap(path: str, group: list[Placed], module: nn.Module) -> None:
    rows = torch.cat([_rows(site, logical_shape(module)[0]) for site, _ in group])
    if len(rows.unique()) < len(rows):
        raise FormatError(f"{path} carries several DoRA pieces for the same features, which PEFT cannot hold.")


def _joined(module: nn.Module, group: list[Placed]) -> tuple[Tensor, Tensor, float]:
    """A_RI, B_OR and the scale of all pieces at a module together."""
    pieces: list[Any] = [piece for _, piece in group]
    site = group[0][0]
    if len(group) == 1 and site.columns is None:
        return pieces[0].A, pieces[0].B, float(pieces[0].scale)
    out = logical_shape(module)[0]
    parts = []
    for (site, _), piece in zip(group, pieces, strict=True):
        part = piece.B.new_zeros(out, piece.B.shape[1])
        part[_rows(site, out)] = piece.scale * piece.B.detach()
        parts.append(part)
    return torch.cat([piece.A for piece in pieces]), torch.cat(parts, dim=1), 1.0


def _rows(site: Site, out: int) -> Tensor:
    return torch.cat([torch.arange(lo, hi) for lo, hi in site.columns or ((0, out),)])


def _magnitude(module: nn.Module, group: list[Placed]) -> Tensor:
    """m of all features; those that no piece adapts keep the norm of their weight."""
    weight = weight_of(module).float()
    m: Tensor = weight.norm(dim=1)
    for site, piece in group:
        assert isinstance(piece, DoRADelta)
        m[_rows(site, len(m))] = piece.m.detach().to(m)
    return m


def _adalora(method: Method, main: list[Placed], modules: dict[str, nn.Module]) -> Writing:
    found = [part for part in method.parts if isinstance(part, AdaLoRA)]
    if len(found) > 1:
        raise FormatError("PEFT holds one AdaLoRA budget, and this adapter has several parts with one each.")
    own = found[0]
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for path, group in _by_module(main, modules).items():
        (site, piece), *more = group
        if more or site.columns is not None:
            raise FormatError(f"{path} is fused and only parts of it carry AdaLoRA, which PEFT cannot hold.")
        stored = piece.stored()
        tensors[f"{PREFIX}{path}.lora_A"], tensors[f"{PREFIX}{path}.lora_B"] = stored["Q"], stored["P"]
        tensors[f"{PREFIX}{path}.lora_E"] = stored["Lambda"].unsqueeze(1)
        pattern[f"{path}.lora_E"] = stored["kept"].tolist()
    settings: dict[str, Any] = {
        "init_r": own.init_rank,
        "target_r": own.target_rank,
        "lora_alpha": _plain(own.alpha),
        "lora_dropout": own.dropout,
        "rank_pattern": pattern,
        "r": 8,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": own.interval,
        "beta1": own.beta1,
        "beta2": own.beta2,
        "orth_reg_weight": own.orthogonality or 0.5,
        "total_step": own.total_steps or 1,
        "init_lora_weights": True,
    }
    return Writing("ADALORA", settings | _defaults(main, modules), tensors)


def _ia3(main: list[Placed], modules: dict[str, nn.Module]) -> Writing:
    tensors: dict[str, Tensor] = {}
    entering: set[str] = set()
    for path, group in _by_module(main, modules).items():
        taps = {site.tap for site, _ in group}
        if len(taps) > 1:
            raise FormatError(f"IA3 rescales both what enters and what leaves {path}; PEFT holds one of the two.")
        out, into = logical_shape(modules[path])
        scale = torch.ones(into if taps == {"input"} else out)
        for site, piece in group:
            assert isinstance(piece, ScaleDelta)
            rows = _rows(site, len(scale))
            scale[rows] = scale[rows] * piece.l.detach().cpu().float()
        if taps == {"input"}:
            entering.add(path)
        tensors[f"{PREFIX}{path}.ia3_l"] = scale.view(1, -1) if taps == {"input"} else scale.view(-1, 1)
    settings = {
        "feedforward_modules": _names(entering, modules),
        "init_ia3_weights": True,
        "fan_in_fan_out": _conv1d(main, modules),
    }
    return Writing("IA3", settings, tensors)


def _add_copies(writing: Writing, copies: Sequence[Placed], modules: dict[str, nn.Module], targets: set[str]) -> None:
    paths = {site.leave for site, _ in copies}
    both = sorted(paths & targets)
    if both:
        raise FormatError(f"{both} are trained as a whole and adapted as well, which PEFT cannot hold.")
    for site, piece in copies:
        tensors = {f"{PREFIX}{site.leave}.{name}": t for name, t in piece.stored().items()}
        writing.tensors.update(tensors)
    if paths:
        writing.settings["modules_to_save"] = _containers(paths, modules)


def _containers(paths: set[str], modules: dict[str, nn.Module]) -> list[str]:
    """The names of PEFT's modules_to_save: a head's own module where all of it was trained, else its leaves."""
    names = set()
    for path in paths:
        name = path
        while "." in name:
            outer = name.rpartition(".")[0]
            inside = {p for p, m in modules.items() if p.startswith(outer + ".") and m._parameters}
            if not inside <= paths or modules[outer]._parameters:
                break
            name = outer
        names.add(name)
    strays = [p for p, m in modules.items() for n in names if p.endswith(n) and p != n and m._parameters]
    strays = [p for p in strays if not any(p == n or p.startswith(n + ".") for n in names)]
    if strays:
        raise FormatError(
            f"PEFT would take {strays[:3]} for trained modules too, as their paths end like {sorted(names)}."
        )
    return sorted(names)


def _add_biases(
    writing: Writing, biases: Sequence[Placed], model: nn.Module, targets: set[str], copied: set[str]
) -> None:
    if not biases:
        return
    deltas: dict[str, Tensor] = {}
    for site, piece in biases:
        own = original(model, site.leave, "bias")
        if own is None:
            raise FormatError(f"{site.leave} has no bias, and PEFT's format has no place for a new one.")
        assert isinstance(piece, BiasDelta)
        delta = deltas.setdefault(site.leave, torch.zeros(own.shape))
        delta[_rows(site, len(delta))] += piece.b.detach().cpu().float()
    every = {p for p, _ in modules_of(model) if original(model, p, "bias") is not None} - copied
    only = every & targets
    writing.settings["bias"] = "lora_only" if set(deltas) <= only else "all"
    for path in sorted(only if writing.settings["bias"] == "lora_only" else every):
        own = original(model, path, "bias")
        assert own is not None
        value = own.detach().cpu().float() + deltas.get(path, torch.zeros(own.shape))
        inner = ".base_layer" if path in targets else ""
        writing.tensors[f"{PREFIX}{path}{inner}.bias"] = value


def _defaults(main: list[Placed], modules: dict[str, nn.Module]) -> dict[str, Any]:
    return {
        "bias": "none",
        "fan_in_fan_out": _conv1d(main, modules),
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _conv1d(main: list[Placed], modules: dict[str, nn.Module]) -> bool:
    return any("Conv1D" in (c.__name__ for c in type(modules[site.leave]).__mro__) for site, _ in main)


def _names(paths: set[str], modules: dict[str, nn.Module]) -> list[str]:
    """The common ends of paths where they mean no other module, else whole paths: sorted, so that bytes repeat."""
    names = set()
    for path in paths:
        end = path.rsplit(".", 1)[-1]
        alike = {p for p in modules if p == end or p.endswith(f".{end}")}
        names.add(end if alike <= paths else path)
    return sorted(names)


def _pattern(name: str, pattern: str, values: dict[str, Any]) -> dict[str, Any]:
    found = mapping(values)
    if not isinstance(found, dict):
        return {name: found, pattern: {}}
    return {name: found.pop("default"), pattern: found}


def _plain(value: float) -> float:
    rounded = round(value, 9)
    return int(rounded) if float(rounded).is_integer() else rounded


def _dropout(method: Method) -> float:
    return float(max((part.dropout for part in method.parts if isinstance(part, LowRank)), default=0.0))
