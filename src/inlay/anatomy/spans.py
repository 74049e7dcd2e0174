"""The feed-forward span in a sub-layer, and the norms before and after a sub-layer."""

from __future__ import annotations

from torch import Tensor

from inlay.anatomy.base import FeedForward
from inlay.anatomy.graph import Call, LeafCall, Trace, depth
from inlay.anatomy.sublayers import Unit


def feed_forward(record: Trace, unit: Unit) -> FeedForward | None:
    """The span of a plain or gated feed-forward layer: one or two projections that enter, one that they both feed."""
    calls = sorted(unit.calls, key=lambda c: c.order)
    if len(calls) not in (2, 3) or any(c.kind != "linear" for c in calls):
        return None
    own = {id(c) for c in calls}
    inner = [c for c in calls if any(id(s) in own for s in record.sources(c.x))]
    last = calls[-1]
    if inner != [last]:
        return None
    entering = calls[:-1]
    if any(c.x.shape[c.axis] != last.y.shape[last.axis] for c in entering):
        return None
    gate = _gate(last, entering)
    up = next(c for c in entering if c is not gate)
    return FeedForward(
        up=up.path,
        gate=gate.path if gate else None,
        down=last.path,
        end=after_dropout(record, last),
        pre_norm=norm_before(record, entering[0].x),
        post_norm=norm_after(record, last),
    )


TOKENWISE = (
    "Mul", "Div", "Add", "Sub", "Neg", "Pow", "Exp", "Sqrt", "Silu", "Gelu", "Relu", "Elu", "Tanh", "Sigmoid",
    "Softplus", "Hardswish", "Hardtanh", "Mish", "LeakyRelu", "Slice", "Split", "Chunk", "View", "Reshape", "Unsqueeze",
    "Squeeze",
    "Clone", "Alias", "ToCopy", "Dropout", "Where", "Clamp", "CopySlices", "Xielu",
)  # fmt: skip


def is_tokenwise(record: Trace, unit: Unit) -> bool:
    """Whether nothing but arithmetic on single features lies between the projections of a span."""
    last = max(unit.calls, key=lambda c: c.order)
    todo, seen = [last.x.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node in record.stops:
            continue
        seen.add(node)
        if not node.name().startswith((*TOKENWISE, "Unsafe", "AsStrided", "torch::autograd::AccumulateGrad")):
            return False
        todo += [following for following, _ in node.next_functions]
    return True


def width(unit: Unit) -> int:
    """The features between the projections of a feed-forward span."""
    last = max(unit.calls, key=lambda c: c.order)
    return int(last.x.shape[last.axis])


def _gate(last: LeafCall, entering: list[LeafCall]) -> LeafCall | None:
    """Of two entering projections, the one whose output passes the activation before the product."""
    if len(entering) < 2:
        return None
    named = [c for c in entering if any(w in c.path.rsplit(".", 1)[-1] for w in ("gate", "w1", "wi_0"))]
    if len(named) == 1:
        return named[0]
    return max(entering, key=lambda c: depth(last.x, c))


def after_dropout(record: Trace, leaf: LeafCall) -> str:
    """The dropout module that takes the leaf's output and nothing else in this run, or the leaf."""
    drop = record.dropouts.get(id(leaf.y))
    if drop is None or len(record.times[drop.path]) != len(record.times[leaf.path]):
        return leaf.path
    return drop.path


def norm_before(record: Trace, x: Tensor) -> str | None:
    """The norm whose output is x and whose *input* is the residual stream (pre-LN).

    A norm whose output is itself added to later (post-LN, or a norm over the embeddings) is not one.
    """
    sources = record.sources(x, stop_at_norms=True)
    if len(sources) != 1 or not isinstance(sources[0], LeafCall) or sources[0].kind != "norm":
        return None
    norm = sources[0]
    return None if any(len(record.inputs(u)) > 1 for u in record.users(norm)) else norm.path


def norm_after(record: Trace, call: Call) -> str | None:
    """The norm over the sum of a sub-layer's output and the residual stream (post-LN), if that is how it ends.

    There the residual is itself a norm's output, and nothing later reads the sub-layer's output around the norm.
    """
    makers = record.sources(call.y, stop_at_norms=True)
    users = [u for u in record.users(makers[-1]) if u.order > call.order] if makers else []
    norms = [u for u in users if isinstance(u, LeafCall) and u.kind == "norm"]
    if len(users) != 1 or len(norms) != 1:
        return None
    others = [c for c in record.inputs(norms[0]) if c not in makers]
    if not others or not all(isinstance(c, LeafCall) and c.kind == "norm" for c in others):
        return None
    return norms[0].path
