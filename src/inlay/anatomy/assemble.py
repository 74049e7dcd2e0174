"""Turns the trace of one run into an `Anatomy`: leaves, blocks, attentions, feed-forward spans, embeddings, head."""

from __future__ import annotations

import dataclasses

from torch import nn

from inlay.anatomy.attentions import Attentions
from inlay.anatomy.base import Anatomy, Axis, Block, FeedForward, Leaf, Mixer, RowAxis
from inlay.anatomy.graph import Call, LeafCall, ModuleCall, Trace
from inlay.anatomy.spans import feed_forward, is_tokenwise, norm_after, norm_before, width
from inlay.anatomy.sublayers import Layer, Tree, Unit, does_feed_forward, layers, mixes_tokens
from inlay.anatomy.tree import (
    head_of,
    hidden_size,
    input_embedding,
    inside,
    modules_of,
    output_embedding,
    static_leaves,
)


def assemble(model: nn.Module, record: Trace) -> Anatomy:
    """The anatomy that a trace shows."""
    modules = dict(modules_of(model))
    tree = Tree(record, modules)
    reached = record.reaching()
    leaves = _leaves(static_leaves(model), tree, reached)
    whole = {path: _as_leaf(call, tree) for path, call in tree.whole.items() if path and path in tree.below}
    found = layers(tree)
    attentions = Attentions(tree, found, getattr(model, "config", None))
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    judge = _Judge(tree)
    blocks: list[Block] = []
    counts: dict[str, int] = {}
    for layer in found:
        block = _block(layer, tree, attentions, leaves, judge)
        if block is None:
            continue
        stack = _stack_name(layer.path) if encoder_decoder else ""
        around = tree.list_around(layer.path)
        index = counts[around] = counts.get(around, -1) + 1
        blocks.append(dataclasses.replace(block, stack=stack, layer=index))
    _mark_routed(blocks, leaves)
    for mixer in (m for b in blocks for m in b.mixers):
        whole.setdefault(mixer.path, _as_leaf(tree.whole[mixer.path], tree))
    head, new_head = head_of(model, leaves)
    everything = [a for b in blocks for a in b.attentions]
    reruns = record.reruns()
    return Anatomy(
        model=type(model).__name__,
        leaves=leaves,
        modules=whole,
        blocks=tuple(blocks),
        embed=_embeddings(model, modules, tree, leaves),
        head=head,
        output=output_embedding(model),
        new_head=new_head,
        hidden_size=hidden_size(model) or _usual_width(whole, blocks),
        causal=any(a.heads.causal and not a.cross for a in everything),
        encoder_decoder=encoder_decoder,
        reruns=reruns,
        problem=None if blocks else "the run on a few tokens showed no repeated layers",
        notes=_notes(leaves, tree, reruns),
    )


def structural(model: nn.Module, problem: str) -> Anatomy:
    """What can be told without a run: leaves, embeddings and head, but no attention and no spans."""
    leaves = static_leaves(model)
    head, new_head = head_of(model, leaves)
    token = input_embedding(model)
    return Anatomy(
        model=type(model).__name__,
        leaves=leaves,
        embed=tuple(p for p, m in modules_of(model) if m is token and p in leaves),
        head=head,
        output=output_embedding(model),
        new_head=new_head,
        hidden_size=hidden_size(model),
        problem=problem,
    )


def _leaves(leaves: dict[str, Leaf], tree: Tree, reached: set[str]) -> dict[str, Leaf]:
    """The leaves with what the run showed of them."""
    for path, leaf in leaves.items():
        call = tree.calls.get(path)
        if call is None:
            leaves[path] = dataclasses.replace(leaf, bypassed=path in tree.record.bypassed)
            continue
        sizes, axis = (leaf.in_features, leaf.out_features), leaf.axis
        if leaf.kind == "norm" and call.x.ndim > 2 and call.x.shape[-1] != leaf.in_features == call.x.shape[1]:
            axis = 1
        if leaf.kind == "embedding":
            sizes = leaf.in_features, call.y.shape[-1]
        elif leaf.kind != "conv":
            sizes = call.x.shape[axis], call.y.shape[axis]
        if leaf.kind == "linear" and sizes != (leaf.in_features, leaf.out_features):
            # Its weight is not the map from x to y that it looks like: several blocks side by side, mostly.
            leaf = dataclasses.replace(leaf, kind="module")
        rows = _rows(call, tree.record.batch)
        leaves[path] = dataclasses.replace(
            leaf,
            in_features=sizes[0],
            out_features=sizes[1],
            axis=axis,
            called=True,
            rows=rows,
            dead=path not in reached,
            bypassed=path in tree.record.bypassed,
        )
    return leaves


def _rows(call: Call, batch: int) -> RowAxis:
    """Where the batch is in what a module is given; tables that are looked up by distance see no rows at all."""
    shape = call.x.shape
    table = isinstance(call, LeafCall) and call.kind == "embedding"
    if len(shape) > 2 - table and shape[0] != batch and shape[1] == batch:
        return "second"
    return "routed" if table and shape[0] not in (1, batch) else "first"


def _as_leaf(call: ModuleCall, tree: Tree) -> Leaf:
    axis = _axis(call, tree)
    into, out = (t.shape[axis if t.ndim > 1 else -1] if t.ndim else 1 for t in (call.x, call.y))
    return Leaf(call.path, "module", into, out, False, called=True, rows=_rows(call, tree.record.batch), axis=axis)


def _axis(call: ModuleCall, tree: Tree) -> Axis:
    """Where a module's features are: where the leaves have them that read what it is given, or what has its shape."""
    if call.x.ndim < 3 or call.y.ndim != call.x.ndim:
        return -1
    axes = {leaf.axis for leaf in tree.leaves(call.path) if leaf.x.shape == call.x.shape}
    return 1 if axes == {1} else -1


def _keeps_positions(call: ModuleCall, tree: Tree) -> bool:
    """Whether a module gives as many positions as it is given: what merges patches stands beside no residual."""
    axis = _axis(call, tree)
    if call.x.ndim < 2 or call.y.ndim < 2:
        return True
    return call.x.numel() // call.x.shape[axis] == call.y.numel() // call.y.shape[axis]


class _Judge:
    """Tells sub-layers that mix tokens from those that do not; asks once for each kind of module."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.known: dict[type[nn.Module], bool] = {}

    def mixes(self, call: ModuleCall) -> bool:
        if does_feed_forward(call.path):
            return False
        kind = type(call.module)
        if kind not in self.known:
            self.known[kind] = mixes_tokens(call, self.tree.record.batch, _axis(call, self.tree)) is not False
        return self.known[kind]


def _block(layer: Layer, tree: Tree, attentions: Attentions, leaves: dict[str, Leaf], judge: _Judge) -> Block | None:
    record = tree.record
    own = [a for a in attentions.of(layer) if a.o is None or not leaves[a.o].dead]
    ffns: list[tuple[int, FeedForward]] = []
    mixers: list[Mixer] = []
    for unit in layer.units:
        if attentions.owns(unit) or all(leaves[c.path].dead for c in unit.calls):
            continue
        span = feed_forward(record, unit)
        if span is not None and (
            unit.path is None or is_tokenwise(record, unit) or not judge.mixes(tree.whole[unit.path])
        ):
            ffns.append((width(unit), span))
        elif unit.path is not None and any(c.kind != "conv" for c in unit.calls):
            call = tree.whole[unit.path]
            norms = norm_before(record, call.x), norm_after(record, call)
            if not _keeps_positions(call, tree):
                continue
            experts = any(leaves[c.path].experts for c in unit.calls) or _routed(unit)
            if not experts and judge.mixes(call):
                makers = [c for c in record.sources(call.y) if isinstance(c, LeafCall)]
                last = makers[0].path if len(makers) == 1 and leaves[makers[0].path].kind == "linear" else None
                mixers.append(Mixer(unit.path, last, *norms))
            else:
                ffns.append((0, FeedForward(unit.path, None, unit.path, unit.path, True, *norms)))
    if not own and not mixers:
        mixers = _without_leaves(layer, tree, judge)
    linears = tuple(p for p, leaf in leaves.items() if inside(p, layer.path) and _adaptable(leaf, leaves))
    if not (own or mixers or ffns or linears):
        return None
    causal = any(a.heads.causal for a in own if not a.cross)
    return Block(layer.path, "", 0, tuple(own), tuple(mixers), _main(ffns, leaves), linears, causal)


def _main(ffns: list[tuple[int, FeedForward]], leaves: dict[str, Leaf]) -> tuple[FeedForward, ...]:
    """The feed-forward spans of a block without its narrow side paths (per-layer gates, low-rank shortcuts)."""
    widest = max((w for w, _ in ffns), default=0)
    kept = [f for w, f in ffns if f.whole or (2 * w > widest and 2 * w > leaves[f.up].in_features)]
    return tuple(kept or [f for _, f in ffns])


def _routed(unit: Unit) -> bool:
    """Whether a unit holds experts as modules in a list, or chooses among them."""
    inner = [c.path.removeprefix(unit.path or "").split(".") for c in unit.calls]
    return any(w.isdigit() for words in inner for w in words) or any("expert" in w for words in inner for w in words)


def _without_leaves(layer: Layer, tree: Tree, judge: _Judge) -> list[Mixer]:
    """Modules that mix tokens without projections of their own: a Fourier transform, weights held as bare tensors."""
    taken = {u.path for u in layer.units} | {c.path for u in layer.units for c in u.calls}
    for path in tree.modules:
        call = tree.whole.get(path)
        if call is None or not inside(path, layer.path) or path in taken or call.x.shape != call.y.shape:
            continue
        if any(t is not None and (t == path or inside(t, path)) for t in taken) or path in tree.calls:
            continue
        if _keeps_positions(call, tree) and judge.mixes(call):
            return [Mixer(path, None, norm_before(tree.record, call.x), norm_after(tree.record, call))]
    return []


def _adaptable(leaf: Leaf, leaves: dict[str, Leaf]) -> bool:
    """Projections that ran, and experts that this run happened not to choose."""
    if leaf.kind != "linear" or leaf.bypassed or leaf.dead:
        return False
    return leaf.called or _sibling_ran(leaf.path, leaves)


def _sibling_ran(path: str, leaves: dict[str, Leaf]) -> bool:
    words = path.split(".")
    for i, word in enumerate(words):
        if word.isdigit():
            before, after = ".".join(words[:i]), ".".join(words[i + 1 :])
            for j in range(64):
                other = leaves.get(f"{before}.{j}.{after}")
                if other is None:
                    break
                if other.called and i > 0:
                    return True
    return False


def _mark_routed(blocks: list[Block], leaves: dict[str, Leaf]) -> None:
    """Leaves inside experts see tokens without their row."""
    for block in blocks:
        for ffn in block.ffns:
            if not ffn.whole:
                continue
            for path, leaf in leaves.items():
                words = path.removeprefix(ffn.up + ".").split(".") if inside(path, ffn.up) else []
                if words and (leaf.experts or any(w.isdigit() for w in words)):
                    leaves[path] = dataclasses.replace(leaf, rows="routed")


def _embeddings(
    model: nn.Module, modules: dict[str, nn.Module], tree: Tree, leaves: dict[str, Leaf]
) -> tuple[str, ...]:
    token = input_embedding(model)
    if token is None:
        ran = [p for p, leaf in leaves.items() if leaf.kind == "embedding" and leaf.called]
        return (max(ran, key=lambda p: leaves[p].in_features),) if ran else ()
    weight = getattr(token, "weight", None)
    tied = [
        p for p, leaf in leaves.items() if leaf.kind == "embedding" and getattr(modules[p], "weight", None) is weight
    ]
    ran = sorted((p for p in tied if p in tree.calls), key=lambda p: tree.calls[p].order)
    return tuple(ran or [p for p in tied if modules[p] is token])


def _usual_width(whole: dict[str, Leaf], blocks: list[Block]) -> int:
    return next((whole[b.path].out_features for b in blocks if b.path in whole), 0)


def _stack_name(stack: str) -> str:
    words = stack.split(".")
    return next((name for name in ("decoder", "encoder") if any(name in w for w in words)), "")


def _notes(leaves: dict[str, Leaf], tree: Tree, reruns: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    bypassed = [p for p, leaf in leaves.items() if leaf.bypassed]
    if bypassed:
        notes.append(f"read without being called, so pieces there would do nothing: {_few(bypassed)}")
    dead = [p for p, leaf in leaves.items() if leaf.dead]
    if dead:
        notes.append(f"no gradient can reach what these compute, so they are in no semantic name: {_few(dead)}")
    if reruns:
        notes.append(f"runs its blocks again in a backward pass of its own, in training mode: {_few(list(reruns))}")
    fused = [p for p, leaf in leaves.items() if leaf.experts]
    if fused:
        notes.append(f"experts in one tensor, out of reach of 'linear'; 'ffn' adapts the block: {_few(fused)}")
    weights = {id(getattr(tree.modules[p], "weight", None)) for p in tree.calls}
    idle = [p for p, leaf in leaves.items() if not leaf.called and not leaf.bypassed]
    asleep = sorted({_top(p, tree) for p in idle if id(getattr(tree.modules[p], "weight", None)) not in weights})
    if asleep:
        notes.append(f"did not run on this example, so they are in no semantic name: {_few(asleep)}")
    return tuple(notes)


def _top(path: str, tree: Tree) -> str:
    """The outermost module around a leaf of which nothing ran."""
    top = path
    while top.rpartition(".")[0] and not tree.leaves(top.rpartition(".")[0]):
        top = top.rpartition(".")[0]
    return top


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


__all__ = ["assemble", "head_of", "structural"]
