"""What a model is made of, as far as adapters care: sites, blocks, attentions, and how to select among them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from inlay.errors import SiteError, nearest

Tap = Literal["output", "input", "through"]
Kind = Literal["linear", "norm", "embedding", "module", "attention"]
Columns = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """Shapes of one attention: query heads, key/value heads, sizes of a key and of a value head."""

    query: int
    kv: int
    key_size: int
    value_size: int
    causal: bool
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """A place for a piece: x is read where `enter` is called, Δ goes where `leave` is called.

    Attributes:
        name: the semantic name it was selected by ("attn.q", "ffn", ...) or the module path.
        enter: path of the module whose input is x.
        leave: path of the module that Δ is added to.
        tap: "output" adds Δ to what leaves `leave`; "input" to what enters it; "through" runs `leave` again on
            its input plus Δ (the published Pfeiffer form in post-LN blocks).
        in_features, out_features: sizes of x and of Δ.
        columns: the ranges of output features that belong to this site where several share one fused projection.
        layer, stack: index of the block, and "encoder" or "decoder" in a model that has both ("" otherwise).
        kind: what stands at `leave`.
        heads: shapes of the attention, for sites on an attention module.
        causal: whether a token at this site sees only earlier ones.
        rows: how the batch lies in x: "first" [B, T, I] or [B*T, I], "second" [T, B, I], or "routed" (the tokens
            of a mixture-of-experts expert, which no longer know their row).
    """

    name: str
    enter: str
    leave: str
    in_features: int
    out_features: int
    tap: Tap = "output"
    columns: Columns | None = None
    layer: int | None = None
    stack: str = ""
    kind: Kind = "linear"
    has_bias: bool = False
    heads: Heads | None = None
    causal: bool = False
    rows: Literal["first", "second", "routed"] = "first"

    @property
    def fused(self) -> bool:
        """Whether this site is only a part of the features of its module."""
        return self.columns is not None


@dataclass(frozen=True, slots=True)
class Leaf:
    """One module without children (or a mixture-of-experts block as a whole) that can host pieces."""

    path: str
    kind: Kind
    in_features: int
    out_features: int
    has_bias: bool
    called: bool = False
    rows: Literal["first", "second", "routed"] = "first"


@dataclass(frozen=True, slots=True)
class Port:
    """The projections that make one of q, k, v: the last leaf, and its features where it is fused."""

    leaf: str
    columns: Columns | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention module and the leaves around it; `o_end` is the dropout after `o`, or `o` itself."""

    path: str
    cross: bool
    heads: Heads
    q: tuple[Port, ...]
    k: tuple[Port, ...]
    v: tuple[Port, ...]
    o: str | None
    o_end: str | None
    pre_norm: str | None = None
    post_norm: str | None = None
    interface: bool = True


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The feed-forward span of a block; `module` is set where it can only be taken as a whole (experts)."""

    up: str
    gate: str | None
    down: str
    end: str
    whole: bool = False
    pre_norm: str | None = None
    post_norm: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated layer of the model."""

    path: str
    stack: str
    layer: int
    attentions: tuple[Attention, ...] = ()
    ffn: FeedForward | None = None
    linears: tuple[str, ...] = ()
    causal: bool = False


SEMANTIC = (
    "attn.q", "attn.k", "attn.v", "attn.o", "cross.q", "cross.k", "cross.v", "cross.o", "ffn.up", "ffn.gate", "ffn.down",
    "attn", "attn.residual", "attn.norm", "cross", "cross.residual", "cross.norm", "ffn", "ffn.residual", "ffn.norm",
    "heads", "cross.heads", "linear", "norm", "embed", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """The sites of one model. Print it to see them; `select` turns selectors into sites."""

    model: str
    leaves: dict[str, Leaf]
    blocks: tuple[Block, ...] = ()
    embed: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    output: str | None = None
    new_head: bool = False
    hidden_size: int = 0
    causal: bool = False
    encoder_decoder: bool = False
    problem: str | None = None
    notes: tuple[str, ...] = field(default=())

    def select(
        self,
        selectors: str | Sequence[str],
        layers: Sequence[int] | None = None,
        kinds: Iterable[Kind] | None = None,
    ) -> list[Site]:
        """All sites that the selectors name, in the order of the model, each once.

        A selector is a semantic name (`attn.q`, `ffn`, `linear`, ...), optionally behind `encoder:` or `decoder:`
        and before `:input`; or a suffix of a module path (`q_proj`), or a glob over module paths (`*.mlp.*`).

        Args:
            selectors: one selector or several.
            layers: keep only these block indices; negative ones count from the last.
            kinds: what a path or glob may stand for; semantic names are not filtered.

        Raises:
            SiteError: one of the selectors, or the layer filter, matches nothing.
        """
        chosen: dict[tuple[object, ...], Site] = {}
        for selector in [selectors] if isinstance(selectors, str) else selectors:
            sites = self._one(selector, kinds)
            if not sites:
                raise SiteError(self._nothing(selector))
            if layers is not None:
                sites = self._in_layers(selector, sites, layers)
            for site in sites:
                chosen.setdefault((site.leave, site.enter, site.tap, site.columns), site)
        order = {path: i for i, path in enumerate(self.leaves)}
        return sorted(chosen.values(), key=lambda s: order.get(s.leave, len(order)))

    def has(self, selector: str) -> bool:
        """Whether the selector matches at least one site."""
        return bool(self._one(selector, None))

    def _in_layers(self, selector: str, sites: list[Site], layers: Sequence[int]) -> list[Site]:
        count = {b.stack: 0 for b in self.blocks}
        for block in self.blocks:
            count[block.stack] = max(count[block.stack], block.layer + 1)
        bad = [i for i in layers if not any(-n <= i < n for n in count.values())]
        if bad:
            raise SiteError(
                f"layers {bad} do not exist: {self.model} has {dict(count) or 'no'} layers, counted from 0."
            )
        kept = [s for s in sites if s.layer is not None and any(s.layer == i % count[s.stack] for i in layers)]
        if not kept:
            raise SiteError(f"sites={selector!r} matches nothing in layers {list(layers)} of {self.model}.")
        return kept

    def _one(self, selector: str, kinds: Iterable[Kind] | None) -> list[Site]:
        stack, rest = "", selector
        for name in ("encoder", "decoder"):
            if rest.startswith(name + ":"):
                stack, rest = name, rest.removeprefix(name + ":")
        if rest.endswith(":input"):
            outer = self._one(selector.removesuffix(":input"), kinds)
            return [self._at_input(s) for s in outer]
        if rest in SEMANTIC:
            return [s for s in self._semantic(rest) if not stack or s.stack == stack]
        return self._by_path(rest, kinds)

    def _at_input(self, site: Site) -> Site:
        """The same span with Δ added to what enters its last projection."""
        leave = site.leave
        for block in self.blocks:
            for attention in block.attentions:
                if leave == attention.o_end and attention.o is not None:
                    leave = attention.o
            if block.ffn is not None and leave == block.ffn.end:
                leave = block.ffn.down
        size = self.leaves[leave].in_features
        enters = site.in_features if site.enter != site.leave else size
        return dataclasses.replace(site, leave=leave, tap="input", out_features=size, in_features=enters, columns=None)

    def _semantic(self, name: str) -> list[Site]:
        if name == "embed":
            return [self._leaf_site(p, "embed") for p in self.embed]
        if name == "head":
            return [self._leaf_site(p, "head") for p in self.head]
        if name == "norm":
            return [self._leaf_site(p, "norm") for p, leaf in self.leaves.items() if leaf.kind == "norm"]
        if name == "linear":
            return [self._leaf_site(p, "linear") for b in self.blocks for p in b.linears]
        part, _, what = name.partition(".")
        sites: list[Site] = []
        for block in self.blocks:
            if part == "ffn" and block.ffn is not None:
                sites += self._ffn_sites(block, block.ffn, what)
            for attention in block.attentions:
                if name in ("heads", "cross.heads"):
                    if attention.cross == (name == "cross.heads"):
                        sites.append(self._heads_site(block, attention, name))
                elif part in ("attn", "cross") and attention.cross == (part == "cross"):
                    sites += self._attention_sites(block, attention, name, what)
        return sites

    def _heads_site(self, block: Block, attention: Attention, name: str) -> Site:
        enters = self.leaves[attention.q[0].leaf].in_features if attention.q else self.hidden_size
        width = attention.heads.query * attention.heads.value_size
        return Site(
            name, attention.path, attention.path, enters, width, layer=block.layer, stack=block.stack,
            kind="attention", heads=attention.heads, causal=attention.heads.causal,
        )  # fmt: skip

    def _attention_sites(self, block: Block, a: Attention, name: str, what: str) -> list[Site]:
        if what in ("q", "k", "v"):
            ports: tuple[Port, ...] = getattr(a, what)
            return [self._leaf_site(p.leaf, name, block, p.columns) for p in ports]
        if a.o is None or a.o_end is None:
            return []
        if what == "o":
            return [self._leaf_site(a.o, name, block)]
        return self._span(block, name, what, a.q[0].leaf if a.q else a.o, a.o_end, a.o, a.pre_norm, a.post_norm)

    def _ffn_sites(self, block: Block, f: FeedForward, what: str) -> list[Site]:
        name = "ffn." + what if what else "ffn"
        if what in ("up", "gate", "down"):
            path: str | None = getattr(f, what)
            return [] if path is None or f.whole else [self._leaf_site(path, name, block)]
        return self._span(block, name, what, f.up, f.end, f.down, f.pre_norm, f.post_norm)

    def _span(
        self,
        block: Block,
        name: str,
        what: str,
        enter: str,
        end: str,
        last: str,
        pre: str | None,
        post: str | None,
    ) -> list[Site]:
        sizes = self.leaves[enter].in_features, self.leaves[last].out_features
        made = Site(
            name, enter, end, *sizes, layer=block.layer, stack=block.stack, kind="module",
            has_bias=self.leaves[last].has_bias, causal=block.causal, rows=self.leaves[last].rows,
        )  # fmt: skip
        if what == "residual":
            return [made] if pre is None else [dataclasses.replace(made, enter=pre, in_features=sizes[1])]
        if what == "norm":
            if post is None:
                return []
            return [dataclasses.replace(made, enter=post, leave=post, tap="through", in_features=sizes[1], kind="norm")]
        return [made]

    def _leaf_site(self, path: str, name: str, block: Block | None = None, columns: Columns | None = None) -> Site:
        leaf = self.leaves[path]
        block = block or self._block_of(path)
        out = sum(hi - lo for lo, hi in columns) if columns else leaf.out_features
        return Site(
            name, path, path, leaf.in_features, out, columns=columns, layer=block.layer if block else None,
            stack=block.stack if block else "", kind=leaf.kind, has_bias=leaf.has_bias,
            causal=block.causal if block else self.causal, rows=leaf.rows,
        )  # fmt: skip

    def _block_of(self, path: str) -> Block | None:
        return next((b for b in self.blocks if path.startswith(b.path + ".")), None)

    def _by_path(self, pattern: str, kinds: Iterable[Kind] | None) -> list[Site]:
        allowed = set(kinds) if kinds is not None else {"linear", "norm", "embedding", "module"}
        glob = any(c in pattern for c in "*?[")
        return [
            self._leaf_site(path, path)
            for path, leaf in self.leaves.items()
            if leaf.kind in allowed
            and (fnmatch.fnmatchcase(path, pattern) if glob else path == pattern or path.endswith("." + pattern))
        ]

    def _nothing(self, selector: str) -> str:
        _, _, bare = selector.removesuffix(":input").rpartition(":")
        if bare in SEMANTIC:
            why = self.problem or "this architecture has no such place"
            return f"sites={selector!r} matches nothing in {self.model}: {why}. `inlay inspect` prints what it has."
        names = set(SEMANTIC) | {p.rsplit(".", 1)[-1] for p in self.leaves}
        return (
            f"sites={selector!r} matches no module of {self.model}: {nearest(selector, names)} "
            "A site is a semantic name, the end of a module path, or a glob over module paths."
        )

    def __str__(self) -> str:
        from inlay.anatomy.show import show

        return show(self)
