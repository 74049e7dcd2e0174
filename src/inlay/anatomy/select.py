"""From selectors ("attn.q", "decoder:ffn", "q_proj", "*.mlp.*") to sites."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from inlay.anatomy.base import (
    SEMANTIC,
    Anatomy,
    Attention,
    Block,
    Columns,
    FeedForward,
    Kind,
    Leaf,
    Mixer,
    Port,
    Site,
)
from inlay.anatomy.tree import inside
from inlay.errors import SiteError, nearest

ANY: frozenset[Kind] = frozenset(("linear", "norm", "embedding", "conv", "module"))


def select(
    anatomy: Anatomy,
    selectors: str | Sequence[str],
    layers: Sequence[int] | None = None,
    kinds: Iterable[Kind] | None = None,
) -> list[Site]:
    """See `Anatomy.select`."""
    chosen: dict[tuple[object, ...], Site] = {}
    allowed = None if kinds is None else frozenset(kinds)
    for selector in [selectors] if isinstance(selectors, str) else selectors:
        sites = matches(anatomy, selector, allowed)
        if not sites:
            raise SiteError(_nothing(anatomy, selector, allowed))
        if layers is not None:
            sites = _in_layers(anatomy, selector, sites, layers)
        for site in sites:
            chosen.setdefault((site.leave, site.enter, site.tap, site.columns), site)
    order = {path: i for i, path in enumerate(anatomy.leaves)}
    # A whole module stands where its last leaf does.
    for path in {s.leave for s in chosen.values()} - order.keys():
        order[path] = max((i for p, i in order.items() if inside(p, path)), default=len(order))
    return sorted(chosen.values(), key=lambda s: order[s.leave])


def matches(anatomy: Anatomy, selector: str, kinds: frozenset[Kind] | None) -> list[Site]:
    """The sites that one selector names; none where it names nothing."""
    stack, rest = "", selector
    for name in ("encoder", "decoder"):
        if rest.startswith(name + ":"):
            stack, rest = name, rest.removeprefix(name + ":")
    if rest.endswith(":input"):
        outer = matches(anatomy, selector.removesuffix(":input"), kinds)
        return [_at_input(anatomy, s) for s in outer]
    if rest in SEMANTIC:
        return [s for s in _semantic(anatomy, rest) if not stack or s.stack == stack]
    return [s for s in _by_path(anatomy, rest, kinds or ANY) if not stack or s.stack == stack]


def _in_layers(anatomy: Anatomy, selector: str, sites: list[Site], layers: Sequence[int]) -> list[Site]:
    count = {b.stack: 0 for b in anatomy.blocks}
    for block in anatomy.blocks:
        count[block.stack] = max(count[block.stack], block.layer + 1)
    bad = [i for i in layers if not any(-n <= i < n for n in count.values())]
    if bad:
        known = ", ".join(f"{n} {stack} layers".replace("  ", " ") for stack, n in count.items()) or "no layers"
        raise SiteError(f"layers {bad} do not exist: {anatomy.model} has {known}, counted from 0.")
    kept = [s for s in sites if s.layer is not None and any(s.layer == i % count[s.stack] for i in layers)]
    if not kept:
        raise SiteError(f"sites={selector!r} matches nothing in layers {list(layers)} of {anatomy.model}.")
    return kept


def _at_input(anatomy: Anatomy, site: Site) -> Site:
    """The same span with Δ added to what enters its last projection."""
    leave = site.leave
    for block in anatomy.blocks:
        for attention in block.attentions:
            if leave == attention.o_end and attention.o is not None:
                leave = attention.o
        for ffn in block.ffns:
            if leave == ffn.end:
                leave = ffn.down
    leaf = anatomy.leaf(leave)
    enters = site.in_features if site.enter != site.leave else leaf.in_features
    return dataclasses.replace(
        site, leave=leave, tap="input", out_features=leaf.in_features, in_features=enters, columns=None, kind=leaf.kind
    )


def _semantic(anatomy: Anatomy, name: str) -> list[Site]:
    if name == "embed":
        return [_leaf_site(anatomy, p, "embed") for p in anatomy.embed]
    if name == "head":
        return [_leaf_site(anatomy, p, "head") for p in anatomy.head]
    if name == "norm":
        ran = any(leaf.called for leaf in anatomy.leaves.values())
        norms = [leaf for leaf in anatomy.leaves.values() if leaf.kind == "norm" and (leaf.called or not ran)]
        norms = [leaf for leaf in norms if not leaf.dead]
        return [_leaf_site(anatomy, leaf.path, "norm") for leaf in norms]
    if name == "linear":
        return [_leaf_site(anatomy, p, "linear", b) for b in anatomy.blocks for p in b.linears]
    part, _, what = name.partition(".")
    # Where one module does the work of both sub-layers (Mamba), it answers to both names.
    merged = part == "ffn" and not any(b.ffns for b in anatomy.blocks)
    sites: list[Site] = []
    for block in anatomy.blocks:
        if part == "ffn":
            for ffn in block.ffns:
                sites += _ffn_sites(anatomy, block, ffn, what)
        for attention in block.attentions:
            if name in ("heads", "cross.heads"):
                if attention.cross == (name == "cross.heads") and attention.form != "other":
                    sites.append(_heads_site(anatomy, block, attention, name))
            elif part in ("attn", "cross") and attention.cross == (part == "cross"):
                sites += _attention_sites(anatomy, block, attention, name, what)
        if part == "attn" or merged:
            for mixer in block.mixers:
                sites += _mixer_sites(anatomy, block, mixer, name, what)
    return sites


def _heads_site(anatomy: Anatomy, block: Block, attention: Attention, name: str) -> Site:
    leaf = anatomy.modules.get(attention.path) or anatomy.leaf(attention.enter)
    width = attention.heads.query * attention.heads.value_size
    return Site(
        name, attention.path, attention.path, leaf.in_features, width, layer=block.layer, stack=block.stack,
        kind="attention", heads=attention.heads, causal=attention.heads.causal, rows=leaf.rows, axis=leaf.axis,
    )  # fmt: skip


def _attention_sites(anatomy: Anatomy, block: Block, a: Attention, name: str, what: str) -> list[Site]:
    if what in ("q", "k", "v"):
        ports: tuple[Port, ...] = getattr(a, what)
        return [_leaf_site(anatomy, p.leaf, name, block, p.columns) for p in ports if not anatomy.leaf(p.leaf).dead]
    if a.o is None or a.o_end is None:
        # No projection takes the result: the module itself is the only place where it can be met.
        return [] if what == "o" or a.path not in anatomy.modules else _span(anatomy, block, name, what, _whole(a))
    if what == "o":
        return [_leaf_site(anatomy, a.o, name, block)]
    return _span(anatomy, block, name, what, FeedForward(a.enter, None, a.o, a.o_end, False, a.pre_norm, a.post_norm))


def _whole(of: Attention | Mixer) -> FeedForward:
    return FeedForward(of.path, None, of.path, of.path, True, of.pre_norm, of.post_norm)


def _mixer_sites(anatomy: Anatomy, block: Block, mixer: Mixer, name: str, what: str) -> list[Site]:
    if what in ("o", "down"):
        return [] if mixer.o is None else [_leaf_site(anatomy, mixer.o, name, block)]
    return _span(anatomy, block, name, what, _whole(mixer)) if what in ("", "residual", "norm") else []


def _ffn_sites(anatomy: Anatomy, block: Block, f: FeedForward, what: str) -> list[Site]:
    name = "ffn." + what if what else "ffn"
    if what in ("up", "gate", "down"):
        path: str | None = getattr(f, what)
        return [] if path is None or f.whole else [_leaf_site(anatomy, path, name, block)]
    return _span(anatomy, block, name, what, f)


def _span(anatomy: Anatomy, block: Block, name: str, what: str, f: FeedForward) -> list[Site]:
    """The site over a whole sub-layer: at its end, after its residual sum, or through the norm behind it."""
    first, last = anatomy.leaf(f.up), anatomy.leaf(f.down)
    end = anatomy.leaves.get(f.end) or anatomy.modules.get(f.end) or last  # a norm in there may see rows laid flat
    made = Site(
        name, f.up, f.end, first.in_features, last.out_features, layer=block.layer, stack=block.stack, kind="module",
        has_bias=last.has_bias, causal=block.causal, rows=last.rows, axis=end.axis,
    )  # fmt: skip
    if what == "residual":
        if f.pre_norm is None:
            return [made]
        return [dataclasses.replace(made, enter=f.pre_norm, in_features=anatomy.leaf(f.pre_norm).in_features)]
    if what == "norm":
        if f.post_norm is None:
            return []
        return [
            dataclasses.replace(
                made, enter=f.post_norm, leave=f.post_norm, tap="through", in_features=_out(made), kind="norm"
            )
        ]
    return [made]


def _out(site: Site) -> int:
    return site.out_features


def _leaf_site(
    anatomy: Anatomy, path: str, name: str, block: Block | None = None, columns: Columns | None = None
) -> Site:
    leaf = anatomy.leaf(path)
    block = block or next((b for b in anatomy.blocks if path == b.path or inside(path, b.path)), None)
    out = sum(hi - lo for lo, hi in columns) if columns else leaf.out_features
    return Site(
        name, path, path, leaf.in_features, out, columns=columns, layer=block.layer if block else None,
        stack=block.stack if block else "", kind=leaf.kind, has_bias=leaf.has_bias,
        causal=block.causal if block else anatomy.causal, rows=leaf.rows, axis=leaf.axis,
    )  # fmt: skip


def _by_path(anatomy: Anatomy, pattern: str, kinds: frozenset[Kind]) -> list[Site]:
    """Leaves whose path ends so or fits the glob; whole modules only where no leaf of any kind does."""
    glob = any(c in pattern for c in "*?[")
    if glob:
        fitting = [leaf for leaf in anatomy.leaves.values() if fnmatch.fnmatchcase(leaf.path, pattern)]
        fitting = [leaf for leaf in fitting if not leaf.bypassed and not leaf.dead]
    else:
        fitting = list(_ending(anatomy.leaves.values(), pattern)) or list(_ending(anatomy.modules.values(), pattern))
    sites = [_leaf_site(anatomy, leaf.path, leaf.path) for leaf in fitting if leaf.kind in kinds]
    if sites and not glob and all(anatomy.leaf(s.leave).bypassed for s in sites):
        raise SiteError(
            f"{sites[0].leave} is never called in {anatomy.model}: the module around it reads its weight directly, so "
            "a piece there would do nothing. Choose the module around it, or another projection."
        )
    return sites


def _ending(leaves: Iterable[Leaf], end: str) -> Iterator[Leaf]:
    return (leaf for leaf in leaves if leaf.path == end or leaf.path.endswith("." + end))


def _nothing(anatomy: Anatomy, selector: str, kinds: frozenset[Kind] | None) -> str:
    bare = selector.removesuffix(":input").rpartition(":")[2]
    if bare in SEMANTIC:
        why = anatomy.problem or "this architecture has no such place"
        if bare in ("heads", "cross.heads") and any(a.form == "other" for b in anatomy.blocks for a in b.attentions):
            why = "its attention is linear, hashed or sampled, so there is no softmax that more keys could enter"
        return f"sites={selector!r} matches nothing in {anatomy.model}: {why}. `inlay inspect` prints what it has."
    wrong = _by_path(anatomy, bare, ANY) if kinds is not None else []
    if wrong:
        return _wrong_kind(anatomy, selector, wrong[0], kinds or ANY)
    names = set(SEMANTIC) | {p.rsplit(".", 1)[-1] for p in (*anatomy.leaves, *anatomy.modules)}
    return (
        f"sites={selector!r} matches no module of {anatomy.model}: {nearest(selector, names)} "
        "A site is a semantic name, the end of a module path, or a glob over module paths."
    )


def _wrong_kind(anatomy: Anatomy, selector: str, site: Site, kinds: frozenset[Kind]) -> str:
    experts = anatomy.leaf(site.leave).experts
    takes = " and ".join(sorted(kinds))
    if experts:
        return (
            f"sites={selector!r}: {site.leave} holds {experts} experts in one three-dimensional weight, and this "
            f"method takes {takes} modules only. Adapt the block of experts as a whole (Bottleneck on 'ffn'), or the "
            "projections around it ('linear')."
        )
    return f"sites={selector!r}: {site.leave} is a {site.kind} module, and this method takes {takes} modules only."
