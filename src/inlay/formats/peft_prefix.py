"""PEFT folders of prefix tuning, read and written.

PEFT passes a prefix as the keys and values of P earlier positions, so its tokens' positions begin at P; ours take no
position. Where positions enter by rotation, the two differ by a rotation of the stored keys, R(-P) k, which is applied
here. Where they are looked up in a table, it is read P positions later (`Prefix(shifts_positions=True)`).

One tensor `prompt_embeddings` of shape (P, 2 L H D) holds k of layer 0, v of layer 0, k of layer 1, ... Legend: P
prefix length, L layers, H key/value heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import FormatError, InlayError
from inlay.formats.peft_folder import Folder, Reading, Writing, check_settings, no_format, refuse
from inlay.formats.peft_modules import base_modules, fill_heads, sort_tensors
from inlay.formats.peft_prompts import PREFIX, TENSOR, add_heads, without
from inlay.methods.full import Copy
from inlay.methods.positions import ShiftedPositions, position_sites
from inlay.methods.prefix import Prefix, PrefixKV, heads_of

if TYPE_CHECKING:
    from inlay.adapter import Adapter

USED = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
MADE_BY = {"prefix_projection", "encoder_hidden_size", "init_weights"}
CHANGING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the text."""


def read_prefix(folder: Folder, model: nn.Module, modules: dict[str, nn.Module], anatomy: Anatomy) -> Reading:
    """A prefix for every self-attention of the decoder, or of the encoder where there is no decoder.

    In an encoder-decoder PEFT writes L layers, but its slicing gives decoder layer l the one stored at 2 l mod L.
    """
    check_settings(folder, USED | MADE_BY, {})
    length, table = int(folder.setting("num_virtual_tokens", 0)), folder.tensors.get(TENSOR)
    found = sort_tensors(Folder(folder.path, folder.config, without(folder, TENSOR)), modules, PREFIX)
    sites = self_attentions(anatomy)
    width = 2 * len(sites) * size_of(sites)
    if table is None:
        found.problems.append(f"missing {TENSOR}")
    elif tuple(table.shape) != (length, width) or length < 1:
        found.problems.append(f"wrong shape {TENSOR}: {tuple(table.shape)} instead of {(length, width)}")
    heads, _ = base_modules(folder, found, model, modules)
    refuse(folder, found.problems)
    assert table is not None
    rotate, shifts = _positions(model, anatomy, sites)
    selector = "decoder:heads" if anatomy.encoder_decoder else "heads"
    method = Prefix(length=length, sites=selector, shifts_positions=shifts)
    keys_values = table.float().view(length, len(sites), 2, size_of(sites))

    def fill(adapter: Adapter) -> None:
        fill_heads(adapter, found)
        step = int(folder.setting("num_transformer_submodules", 1))
        order = {site.leave: step * i % len(sites) for i, site in enumerate(sites)}
        for piece, site in zip(adapter.pieces.values(), adapter.sites, strict=True):
            if isinstance(piece, PrefixKV):
                k, v = keys_values[:, order[site.leave]].unbind(1)
                k = rotate(k.reshape(length, piece.heads, piece.key_size), -length).reshape(length, -1)
                piece.load_stored({"P_k": k, "P_v": v})

    return Reading(method, heads, fill)


def write_prefix(adapter: Adapter) -> Writing:
    """What to write for a prefix.

    Raises:
        FormatError: there are prefixes that PEFT has no place for, not all that it has, or other pieces; or the tokens'
            positions would begin elsewhere in PEFT.
    """
    from inlay.anatomy import anatomy

    placed = [(s, p) for s, p in zip(adapter.sites, adapter.pieces.values(), strict=True) if not isinstance(p, Copy)]
    prefixes = {site.leave: p for site, p in placed if isinstance(p, PrefixKV)}
    if not all(isinstance(p, PrefixKV | ShiftedPositions) for _, p in placed):
        raise no_format(adapter)
    found = anatomy(adapter.model)
    sites = self_attentions(found)
    wrong = sorted(prefixes.keys() ^ {site.leave for site in sites})
    if wrong or len(prefixes) < sum(isinstance(p, PrefixKV) for _, p in placed):
        where = "decoder self-attention" if found.encoder_decoder else "self-attention"
        raise FormatError(
            f"PEFT holds one prefix for every {where} and for nothing else; this adapter differs at {wrong[:4]}. Train "
            f'Prefix(sites={"decoder:heads" if found.encoder_decoder else "heads"!r}), or save with format="native".'
        )
    rotate, shifts = _positions(adapter.model, found, sites)
    if shifts != any(isinstance(p, ShiftedPositions) for _, p in placed):
        raise FormatError(
            "in PEFT the tokens' positions begin behind the prefix, and this prefix was not trained so. Train "
            'Prefix(shifts_positions=True), or save with format="native".'
        )
    lengths = {p.length for p in prefixes.values()}
    if len(lengths) > 1:
        raise FormatError(f"PEFT holds prefixes of one length, and these have {sorted(lengths)}.")
    step = 2 if found.encoder_decoder else 1
    layers: list[Tensor | None] = [None] * len(sites)
    for i, site in enumerate(sites):
        piece = prefixes[site.leave]
        stored = piece.stored()
        k = stored["P_k"].detach().cpu().float().view(piece.length, piece.heads, piece.key_size)
        pair = torch.cat([rotate(k, piece.length).reshape(piece.length, -1), stored["P_v"].cpu().float()], dim=1)
        place = step * i % len(sites)
        known = layers[place]
        if known is not None and not torch.equal(known, pair):
            raise FormatError(
                f"PEFT gives several layers of an encoder-decoder with {len(sites)} layers the same prefix "
                f"({site.leave} among them), and these differ. Save with format='native'."
            )
        layers[place] = pair
    empty = torch.zeros(next(iter(lengths)), 2 * size_of(sites))
    table = torch.cat([empty if pair is None else pair for pair in layers], dim=1)
    heads = heads_of(sites[0])
    settings: dict[str, Any] = {
        "num_virtual_tokens": lengths.pop(),
        "token_dim": size_of(sites),
        "num_transformer_submodules": step,
        "num_attention_heads": heads.kv,
        "num_layers": len(sites),
        "prefix_projection": False,
        "encoder_hidden_size": size_of(sites),
        "init_weights": None,
    }
    writing = Writing("PREFIX_TUNING", settings, {TENSOR: table})
    add_heads(adapter, writing)
    return writing


def self_attentions(anatomy: Anatomy) -> list[Site]:
    """The attentions that PEFT gives a prefix, in the order of their layers.

    Raises:
        FormatError: they differ in their shapes, or hide old keys.
    """
    sites = anatomy.select("decoder:heads" if anatomy.encoder_decoder else "heads")
    sites = sorted(sites, key=lambda s: s.layer or 0)
    shapes = {(heads_of(s).kv, heads_of(s).key_size, heads_of(s).value_size) for s in sites}
    if len(shapes) > 1 or heads_of(sites[0]).key_size != heads_of(sites[0]).value_size:
        raise FormatError(
            f"PEFT's prefixes have one shape, and the attentions of {anatomy.model} have {sorted(shapes)}."
        )
    if any(heads_of(s).window for s in sites):
        raise FormatError(
            f"{anatomy.model} has sliding windows, in which PEFT's prefix falls out of sight as an old position does; "
            "here every token sees it. The two are not the same function."
        )
    return sites


def size_of(sites: list[Site]) -> int:
    """H D"""
    heads = heads_of(sites[0])
    return heads.kv * heads.key_size


Rotation = Callable[[Tensor, int], Tensor]


def _positions(model: nn.Module, anatomy: Anatomy, sites: list[Site]) -> tuple[Rotation, bool]:
    """How stored keys [P, H, D] are moved by some positions, and whether the table of positions is read later instead.

    Raises:
        FormatError: positions enter this model in a way that cannot be moved exactly.
    """
    rotary = {id(m): m for _, m in model.named_modules() if isinstance(getattr(m, "inv_freq", None), Tensor)}
    if rotary:
        return _rotation(model, list(rotary.values()), sites), False
    try:
        position_sites(anatomy, sites)
    except InlayError as error:
        raise FormatError(
            f"a prefix of PEFT moves the positions of the tokens, and it is not known how {anatomy.model} learns them "
            f"(relative biases?): {error}"
        ) from error
    return (lambda k, by: k), True


def _rotation(model: nn.Module, rotary: list[nn.Module], sites: list[Site]) -> Rotation:
    """k ↦ R(n) k, checked against what the model's own functions do."""
    kinds = {str(getattr(m, "rope_type", "default")) for m in rotary}
    frequencies: list[Any] = [m.inv_freq for m in rotary]
    if kinds & set(CHANGING) or any(not torch.equal(f, frequencies[0]) for f in frequencies):
        raise FormatError(
            f"the rotary embedding of {type(model).__name__} is not the same everywhere or at every length "
            f"({sorted(kinds)}), so that a prefix cannot be moved by a rotation."
        )
    inv_freq = frequencies[0].detach().float().cpu()
    width = 2 * len(inv_freq)

    def halves(k: Tensor, by: int) -> Tensor:
        angle = by * inv_freq
        cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
        turned, rest = k[..., :width], k[..., width:]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    def pairs(k: Tensor, by: int) -> Tensor:
        angle = (by * inv_freq).repeat_interleave(2)
        turned, rest = k[..., :width], k[..., width:]
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([turned * angle.cos() + other * angle.sin(), rest], dim=-1)

    theirs = _own_rotation(model, rotary[0], sites[0], width)
    for guess in (halves, pairs):
        if torch.allclose(guess(_sample(sites[0]), 3), theirs, atol=1e-4):
            return guess
    raise FormatError(f"{type(model).__name__} rotates keys in a way of its own, so that a prefix cannot be moved.")


def _sample(site: Site) -> Tensor:
    return torch.linspace(-1, 1, heads_of(site).key_size)[None, None]


def _own_rotation(model: nn.Module, rotary: nn.Module, site: Site, width: int) -> Tensor:
    """What the model's own functions make of a key at position 3, without the scaling that some of them add."""
    module = model.get_submodule(site.leave)
    code = sys.modules[type(module).__module__]
    apply = getattr(code, "apply_rotary_pos_emb", None)
    k = _sample(site)[None]
    if apply is None:
        raise FormatError(f"{type(module).__name__} has no apply_rotary_pos_emb, so its rotation is not known.")
    weight = rotary.inv_freq
    assert isinstance(weight, Tensor)
    try:
        cos, sin = (t.float().cpu() for t in rotary(k.to(weight.device), torch.tensor([[3]], device=weight.device)))
        scale = float(getattr(rotary, "attention_scaling", 1.0))
        cos, sin = cos / scale, sin / scale
        try:
            return apply(k, k, cos, sin)[1][0]  # type: ignore[no-any-return]
        except RuntimeError:
            part = apply(k[..., :width], k[..., :width], cos, sin)[1][0]
            return torch.cat([part, k[0, ..., width:]], dim=-1)
    except Exception as error:
        raise FormatError(f"the rotation of {type(module).__name__} could not be tried out: {error}") from error
