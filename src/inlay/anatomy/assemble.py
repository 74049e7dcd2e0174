"""Turns the trace of one run into an `Anatomy`: blocks, attentions, feed-forward spans, embeddings, head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Attention, Block, Columns, FeedForward, Leaf, Port
from inlay.anatomy.probe import (
    AttentionCall,
    LeafCall,
    Trace,
    children_of,
    fused_columns,
    heads_of,
    modules_of,
    sequence_head,
    static_leaves,
)

HEADED = ("Classification", "QuestionAnswering", "MultipleChoice", "DoubleHeads", "RewardModel")


def assemble(model: nn.Module, record: Trace) -> Anatomy:
    """The anatomy that a trace shows."""
    leaves = _leaves(model, record)
    containers = {
        f"{path}.{name}": f"{path}.{name}"
        for path, module in modules_of(model)
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    }
    attentions = _attentions(record)
    owned = {p.leaf for a in attentions for port in (a.q, a.k, a.v) for p in port} | {a.o for a in attentions if a.o}
    blocks = _blocks(record, leaves, containers, attentions, owned, model)
    config = getattr(model, "config", None)
    head, new_head = head_of(model, leaves)
    return Anatomy(
        model=type(model).__name__,
        leaves=leaves,
        blocks=tuple(blocks),
        embed=_embeddings(model, record, leaves),
        head=head,
        output=output_embedding(model),
        new_head=new_head,
        hidden_size=hidden_size(model),
        causal=any(a.heads.causal and not a.cross for a in attentions),
        encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        problem=None if attentions else "no call of the attention function was seen",
    )


def hidden_size(model: nn.Module) -> int:
    """The width of the residual stream, as the config says it."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 0


def output_embedding(model: nn.Module) -> str | None:
    """The path of the language-model head, if there is one."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        wanted = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return next((path for path, module in modules_of(model) if module is wanted), None) if wanted is not None else None


def head_of(model: nn.Module, leaves: dict[str, Leaf]) -> tuple[tuple[str, ...], bool]:
    """The leaves of the task head, and whether it is the kind that is new for each task.

    A head is what stands outside `model.base_model` and is not the output embedding.
    """
    base = getattr(model, "base_model", model)
    output = output_embedding(model)
    if base is model:
        return (), False
    inside = {path for path, module in modules_of(model) if module is base}
    prefix = next(iter(inside), "") + "."
    head = tuple(p for p in leaves if not p.startswith(prefix) and p != output)
    return head, bool(head) and any(word in type(model).__name__ for word in HEADED)


def _leaves(model: nn.Module, record: Trace) -> dict[str, Leaf]:
    leaves = static_leaves(model)
    for call in record.leaves:
        leaf = leaves[call.path]
        if leaf.kind == "embedding":
            sizes = leaf.in_features, call.y.shape[-1]
        else:
            sizes = call.x.shape[-1], call.y.shape[-1]
        second = call.x.ndim >= 3 and call.x.shape[1] == 1 and call.x.shape[0] > 1
        rowless = leaf.kind == "embedding" and call.x.shape[0] != 1
        leaves[call.path] = dataclasses.replace(
            leaf,
            in_features=sizes[0],
            out_features=sizes[1],
            called=True,
            rows="routed" if rowless else "second" if second else leaf.rows,
        )
    return leaves


def _embeddings(model: nn.Module, record: Trace, leaves: dict[str, Leaf]) -> tuple[str, ...]:
    get = getattr(model, "get_input_embeddings", None)
    try:
        token = get() if callable(get) else None
    except NotImplementedError:
        token = None
    named = dict(modules_of(model))
    if token is None:
        return ()
    weight = getattr(token, "weight", None)
    tied = [p for p, leaf in leaves.items() if leaf.kind == "embedding" and named[p].weight is weight]
    called = {call.path: call.order for call in reversed(record.leaves)}
    seen = sorted((p for p in tied if p in called), key=called.__getitem__)
    return tuple(seen or [p for p in tied if named[p] is token])


def _attentions(record: Trace) -> list[Attention]:
    found: dict[str, Attention] = {}
    for call in record.attentions:
        if call.path in found:
            continue
        q, k, v = (_ports(record, t) for t in (call.q, call.k, call.v))
        ports = _columns(record, call, {"q": q, "k": k, "v": v})
        o = _consumer(record, call)
        o_end = _after_dropout(record, o) if o is not None else None
        own = [x for x in record.leaves if any(p.leaf == x.path for p in ports["q"])]
        cross = _is_cross(record, call, q, k)
        found[call.path] = Attention(
            path=call.path,
            cross=cross,
            heads=dataclasses.replace(heads_of(call), causal=call.causal and not cross),
            q=ports["q"],
            k=ports["k"],
            v=ports["v"],
            o=o.path if o else None,
            o_end=o_end,
            pre_norm=_norm_before(record, own[0].x) if own else None,
            post_norm=_norm_after(record, o) if o else None,
        )
    return list(found.values())


def _ports(record: Trace, tensor: Tensor) -> list[LeafCall]:
    return [c for c in record.sources(tensor) if isinstance(c, LeafCall)]


def _columns(record: Trace, call: AttentionCall, sources: dict[str, list[LeafCall]]) -> dict[str, tuple[Port, ...]]:
    """Ports of q, k and v; a leaf that feeds more than one of them is fused, and its features are told apart."""
    parts = {"q": call.q, "k": call.k, "v": call.v}
    users: dict[str, list[str]] = {}
    for name, calls in sources.items():
        for leaf in calls:
            users.setdefault(leaf.path, []).append(name)
    columns: dict[tuple[str, str], Columns | None] = {}
    for calls in sources.values():
        for leaf in calls:
            names = users[leaf.path]
            if len(names) > 1 and (leaf.path, names[0]) not in columns:
                wanted = {n: parts[n] for n in names}
                ranges = _contiguous(wanted) if leaf.y.is_meta else fused_columns(leaf, wanted)
                columns |= {(leaf.path, n): r for n, r in ranges.items()}
    return {
        name: tuple(Port(leaf.path, columns.get((leaf.path, name))) for leaf in calls)
        for name, calls in sources.items()
    }


def _contiguous(parts: dict[str, Tensor]) -> dict[str, Columns | None]:
    """On the meta device there are no values to follow; only the counts matter there, so q | k | v is taken."""
    ranges: dict[str, Columns | None] = {}
    start = 0
    for name, part in parts.items():
        size = part.shape[1] * part.shape[-1]
        ranges[name] = ((start, start + size),)
        start += size
    return ranges


def _is_cross(record: Trace, call: AttentionCall, q: list[LeafCall], k: list[LeafCall]) -> bool:
    """Cross-attention reads its keys from another tensor than its queries."""
    if not q or not k:
        return False
    if q[0] is k[0]:
        return False
    xq, xk = q[0].x, k[0].x
    if xq.shape[:-1] != xk.shape[:-1]:
        return True
    name = call.path.rsplit(".", 1)[-1].lower()
    if any(word in name for word in ("cross", "encoder_attn", "encdec", "encoder_decoder")):
        return True
    return _roots(record, xk).isdisjoint(_roots(record, xq))


def _roots(record: Trace, tensor: Tensor) -> set[int]:
    return {id(c) for c in record.sources(tensor, stop_at_norms=True)} | {id(tensor)}


def _consumer(record: Trace, call: AttentionCall) -> LeafCall | None:
    """The first projection that takes the attention's result and nothing of the residual stream."""
    for leaf in record.leaves:
        if leaf.order > call.order and leaf.y.requires_grad and leaf.x.is_floating_point():
            sources = record.sources(leaf.x)
            if call in sources and _is_projection(record, leaf):
                return leaf
    return None


def _is_projection(record: Trace, leaf: LeafCall) -> bool:
    return id(leaf.y) in record.tags


def _after_dropout(record: Trace, leaf: LeafCall) -> str:
    """The dropout module that takes the leaf's output and nothing else in this run, or the leaf."""
    for drop in record.dropouts:
        if drop.x is leaf.y and sum(d.path == drop.path for d in record.dropouts) == sum(
            c.path == leaf.path for c in record.leaves
        ):
            return drop.path
    return leaf.path


def _norm_before(record: Trace, x: Tensor) -> str | None:
    """The norm whose output is x and whose *input* is the residual stream (pre-LN).

    A norm whose output is itself added to later (post-LN, or a norm over the embeddings) is not one.
    """
    sources = record.sources(x, stop_at_norms=True)
    if len(sources) != 1 or sources[0] not in record.norms.values():
        return None
    norm = sources[0]
    for call in [*record.leaves, *record.norms.values()]:
        if call.order > norm.order and call.x.is_floating_point():
            together = record.sources(call.x, stop_at_norms=True)
            if norm in together and len(together) > 1:
                return None
    return norm.path


def _norm_after(record: Trace, leaf: LeafCall) -> str | None:
    """The norm over the sum of the leaf's output and the residual stream (post-LN), if that is how the block ends.

    There the residual is itself a norm's output, and nothing later reads the leaf's output around the norm.
    """
    norms = list(record.norms.values())
    for norm in sorted(norms, key=lambda n: n.order):
        if norm.order < leaf.order:
            continue
        sources = record.sources(norm.x, stop_at_norms=True)
        if leaf not in sources:
            continue
        others = [c for c in sources if c is not leaf]
        if not others or not all(c in norms for c in others):
            return None
        later = [c for c in [*record.leaves, *norms] if c.order > norm.order and c.x.is_floating_point()]
        if any(leaf in record.sources(c.x, stop_at_norms=True) for c in later):
            return None
        return norm.path
    return None


def _blocks(
    record: Trace,
    leaves: dict[str, Leaf],
    containers: dict[str, str],
    attentions: list[Attention],
    owned: set[str],
    model: nn.Module,
) -> list[Block]:
    projections = [p for p, leaf in leaves.items() if leaf.kind in ("linear", "module")]
    groups: dict[str, list[Attention]] = {}
    for attention in attentions:
        groups.setdefault(_block_path(attention.path, containers, projections, attention), []).append(attention)
    tops = {_stack_path(path) for path in groups} | _outer_lists(containers)
    for path in containers:
        if _stack_path(path) in tops and path not in groups and not _inside(path, groups):
            if any(p.startswith(path + ".") and leaves[p].kind == "linear" for p in projections):
                groups[path] = []
    order = {path: i for i, path in enumerate(containers)}
    stacks = sorted(
        {_stack_path(p) for p in groups},
        key=lambda s: min(order.get(p, 0) for p in groups if _stack_path(p) == s),
    )
    named = dict(modules_of(model))
    blocks: list[Block] = []
    for stack in stacks:
        members = sorted((p for p in groups if _stack_path(p) == stack), key=lambda p: order.get(p, 0))
        for index, path in enumerate(members):
            own = groups[path]
            ffn = _feed_forward(record, leaves, path, own, owned, named)
            inside = tuple(p for p in projections if p.startswith(path + ".") and leaves[p].kind == "linear")
            causal = any(a.heads.causal for a in own if not a.cross)
            blocks.append(Block(path, _stack_name(stack, model), index, tuple(own), ffn, inside, causal))
    return blocks


def _outer_lists(containers: dict[str, str]) -> set[str]:
    """The module lists that are not inside another one."""
    return {_stack_path(p) for p in containers if not any(p.startswith(q + ".") for q in containers if q != p)}


def _inside(path: str, groups: Iterable[str]) -> bool:
    return any(path.startswith(g + ".") or g.startswith(path + ".") for g in groups)


def _stack_path(path: str) -> str:
    return path.rpartition(".")[0]


def _stack_name(stack: str, model: nn.Module) -> str:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ""
    words = stack.split(".")
    return "decoder" if "decoder" in words else "encoder" if "encoder" in words else ""


def _block_path(path: str, containers: dict[str, str], projections: list[str], attention: Attention) -> str:
    """The innermost list element around an attention that also holds other projections; else the outermost."""
    own = {p.leaf for ports in (attention.q, attention.k, attention.v) for p in ports} | {attention.o}
    around = [c for c in containers if path == c or path.startswith(c + ".")]
    for element in sorted(around, key=len, reverse=True):
        if any(p.startswith(element + ".") and p not in own and not p.startswith(path + ".") for p in projections):
            return element
    return min(around, key=len) if around else path


def _feed_forward(
    record: Trace,
    leaves: dict[str, Leaf],
    path: str,
    attentions: list[Attention],
    owned: set[str],
    named: dict[str, nn.Module],
) -> FeedForward | None:
    def belongs(p: str) -> bool:
        return p.startswith(path + ".") and p not in owned and not any(p.startswith(a.path + ".") for a in attentions)

    inside = [p for p, leaf in leaves.items() if belongs(p) and leaf.kind in ("linear", "module")]
    calls: dict[str, LeafCall] = {}
    for call in record.leaves:
        if call.path in inside and leaves[call.path].kind == "linear":
            calls.setdefault(call.path, call)
    if not inside:
        return None
    entering = [
        c for c in calls.values() if not any(isinstance(s, LeafCall) and s.path in calls for s in record.sources(c.x))
    ]
    ordered = sorted(calls.values(), key=lambda c: c.order)
    last = ordered[-1] if ordered else None
    simple = (
        last is not None
        and len(calls) == len(inside)
        and len(calls) in (2, 3)
        and len(entering) == len(calls) - 1
        and last not in entering
    )
    if not simple or last is None:
        return _whole(leaves, path, inside, named, record)
    gate = _gate(record, last, entering)
    up = next(c for c in entering if c is not gate)
    return FeedForward(
        up=up.path,
        gate=gate.path if gate else None,
        down=last.path,
        end=_after_dropout(record, last),
        pre_norm=_norm_before(record, entering[0].x),
        post_norm=_norm_after(record, last),
    )


def _gate(record: Trace, last: LeafCall, entering: list[LeafCall]) -> LeafCall | None:
    """Of two entering projections, the one whose output passes the activation before the product."""
    if len(entering) < 2:
        return None
    named = [c for c in entering if any(w in c.path.rsplit(".", 1)[-1] for w in ("gate", "w1", "wi_0"))]
    if len(named) == 1:
        return named[0]
    return max(entering, key=lambda c: _depth(last.x, c.y))


def _depth(tensor: Tensor, target: Tensor) -> int:
    """How many graph nodes lie between a tensor and the cut output it was computed from."""
    todo: list[tuple[torch.autograd.graph.Node | None, int]] = [(tensor.grad_fn, 0)]
    best = 0
    while todo:
        node, depth = todo.pop()
        if node is None:
            continue
        if getattr(node, "variable", None) is target:
            best = max(best, depth)
        todo += [(following, depth + 1) for following, _ in node.next_functions]
    return best


def _whole(
    leaves: dict[str, Leaf], block: str, inside: list[str], named: dict[str, nn.Module], record: Trace
) -> FeedForward | None:
    """A mixture of experts, or anything else that is no plain span: the module that holds all of it."""
    parents = [p.rpartition(".")[0] for p in inside]
    common = parents[0]
    while common != block and not all((p + ".").startswith(common + ".") for p in parents):
        common = common.rpartition(".")[0]
    if common == block or common in leaves or isinstance(named[common], nn.ModuleList):
        return None
    width = next((leaves[p].in_features for p in inside if leaves[p].called), 0)
    leaves[common] = Leaf(common, "module", width, width, False, called=True)
    for path in inside:
        if path.startswith(common + ".") and any(c.isdigit() for c in path.removeprefix(common).split(".")):
            leaves[path] = dataclasses.replace(leaves[path], rows="routed")
    return FeedForward(common, None, common, common, whole=True)


def structural(model: nn.Module, problem: str) -> Anatomy:
    """What can be told without a run: leaves, embeddings and head, but no attention and no spans."""
    leaves = static_leaves(model)
    head, new_head = head_of(model, leaves)
    return Anatomy(
        model=type(model).__name__,
        leaves=leaves,
        embed=_embeddings(model, Trace(), leaves),
        head=head,
        output=output_embedding(model),
        new_head=new_head,
        hidden_size=hidden_size(model),
        problem=problem,
    )


__all__ = ["assemble", "children_of", "sequence_head", "structural"]
