"""What a model is made of, as far as adapters care: sites, leaves, blocks, attentions, feed-forward spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tap = Literal["output", "input", "through"]
Kind = Literal["linear", "norm", "embedding", "conv", "module", "attention"]
RowAxis = Literal["first", "second", "routed"]
Axis = Literal[-1, 1]
Columns = tuple[tuple[int, int], ...]

SEMANTIC = (
    "attn.q", "attn.k", "attn.v", "attn.o", "cross.q", "cross.k", "cross.v", "cross.o", "ffn.up", "ffn.gate",
    "ffn.down", "attn", "attn.residual", "attn.norm", "cross", "cross.residual", "cross.norm", "ffn",
    "ffn.residual", "ffn.norm",
    "heads", "cross.heads", "linear", "norm", "embed", "head",
)  # fmt: skip
"""Selectors that name a place by what it does; everything else is the end of a module path, or a glob."""


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
        rows: how the batch lies in x: "first" [B, T, I] or [B*T, I], "second" [T, B, I], or "routed" (tokens
            of a mixture-of-experts expert, which no longer know their row).
        axis: where the features lie, in x and in y: last, or second in convolutions.
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
    rows: RowAxis = "first"
    axis: Axis = -1

    @property
    def fused(self) -> bool:
        """Whether this site is only a part of the features of its module."""
        return self.columns is not None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module that can host pieces: one without children, or one that is taken as a whole.

    Attributes:
        called: whether it ran on the example.
        bypassed: the module around it ran and read its weight without calling it, so that pieces would do nothing.
        dead: it ran, but no gradient can reach it: what it computes only chooses (top-k), or is not used.
        experts: how many experts its three-dimensional weight holds.
    """

    path: str
    kind: Kind
    in_features: int
    out_features: int
    has_bias: bool
    called: bool = False
    rows: RowAxis = "first"
    axis: Axis = -1
    bypassed: bool = False
    dead: bool = False
    experts: int = 0


@dataclass(frozen=True, slots=True)
class Port:
    """The projections that make one of q, k, v: the last leaf, and its features where it is fused."""

    leaf: str
    columns: Columns | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention module and the leaves around it.

    Attributes:
        enter: the leaf or module where the sub-layer's input is read; in low-rank projections not `q` itself.
        o, o_end: the output projection, and the dropout after it (or `o` itself).
        form: "interface" calls transformers' attention function; "softmax" computes softmax(q kᵀ) v by itself;
            "other" has queries, keys and values, but no softmax over all keys: linear, hashed or sampled attention.
    """

    path: str
    cross: bool
    heads: Heads
    q: tuple[Port, ...]
    k: tuple[Port, ...]
    v: tuple[Port, ...]
    o: str | None
    o_end: str | None
    enter: str
    pre_norm: str | None = None
    post_norm: str | None = None
    form: Literal["interface", "softmax", "other"] = "interface"


@dataclass(frozen=True, slots=True)
class Mixer:
    """A sub-layer that mixes tokens without queries and keys (state space, recurrence, Fourier), taken as a whole.

    `o` is the projection whose output it returns, if there is one.
    """

    path: str
    o: str | None = None
    pre_norm: str | None = None
    post_norm: str | None = None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A feed-forward span; `whole` where it can only be taken as one module (a mixture of experts)."""

    up: str
    gate: str | None
    down: str
    end: str
    whole: bool = False
    pre_norm: str | None = None
    post_norm: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated layer of the model, with its sub-layers in the order in which they run."""

    path: str
    stack: str
    layer: int
    attentions: tuple[Attention, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    ffns: tuple[FeedForward, ...] = ()
    linears: tuple[str, ...] = ()
    causal: bool = False

    @property
    def ffn(self) -> FeedForward | None:
        """The last feed-forward span, which is the only one in most models."""
        return self.ffns[-1] if self.ffns else None


@dataclass(frozen=True)
class Anatomy:
    """The sites of one model. Print it to see them; `select` turns selectors into sites.

    Attributes:
        leaves: modules without children, by path, in the order of the model.
        modules: modules with children that take a tensor and give one, for sites that name them whole.
        blocks: the repeated layers.
        embed, head, output: paths of the token embeddings, of the task head's leaves, of the output embedding.
        new_head: whether the head is of the kind that is new for each task.
        hidden_size: the width of the residual stream.
        causal, encoder_decoder: what kind of model it is.
        reruns: modules that run their blocks without gradients, and again in a backward pass of their own (reversible
            layers).
        problem: why nothing, or no attention, was found.
        notes: what a user should know: parts that did not run, leaves that cannot host pieces.
    """

    model: str
    leaves: dict[str, Leaf]
    modules: dict[str, Leaf] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    embed: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    output: str | None = None
    new_head: bool = False
    hidden_size: int = 0
    causal: bool = False
    encoder_decoder: bool = False
    reruns: tuple[str, ...] = ()
    problem: str | None = None
    notes: tuple[str, ...] = ()

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
        from inlay.anatomy.select import select

        return select(self, selectors, layers, kinds)

    def has(self, selector: str) -> bool:
        """Whether the selector matches at least one site."""
        from inlay.anatomy.select import matches

        return bool(matches(self, selector, None))

    def leaf(self, path: str) -> Leaf:
        """The leaf or whole module at a path."""
        return self.leaves.get(path) or self.modules[path]

    def __str__(self) -> str:
        from inlay.anatomy.show import show

        return show(self)
