"""Attentions that do not call transformers' attention function, recognised by what they compute.

Between the projection that takes an attention's result and the projections before it, the graph holds
softmax(q kᵀ) v: a softmax whose scores come from a product of two projections, and a product of the softmax with a
third. Where there is no softmax (hashed, sampled, linear attention), the names of the projections tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from inlay.anatomy.base import Columns, Heads
from inlay.anatomy.graph import LeafCall, Node, Trace, later, reaching

PRODUCTS = {"BmmBackward0": 0, "MmBackward0": 0, "BaddbmmBackward0": 1, "AddmmBackward0": 1}
"""Matrix products, and where the first of their two operands stands among the nodes that follow."""

SAVED = {
    "BmmBackward0": ("_saved_self", "_saved_mat2"),
    "MmBackward0": ("_saved_self", "_saved_mat2"),
    "BaddbmmBackward0": ("_saved_batch1", "_saved_batch2"),
    "AddmmBackward0": ("_saved_mat1", "_saved_mat2"),
}


@dataclass(eq=False)
class Found:
    """One attention: where its queries, keys and values stand in the graph, and the leaf that takes its result.

    `stack` counts the matrices in the product of queries and keys: the heads of all rows; 0 where it is not known.
    """

    q: tuple[LeafCall, ...]
    k: tuple[LeafCall, ...]
    v: tuple[LeafCall, ...]
    o: LeafCall | None
    nodes: tuple[Node, Node, Node] | None = None
    key_size: int = 0
    stack: int = 0
    causal: bool = False

    def columns(self, leaf: LeafCall, part: str) -> Columns | None:
        """Which features of a leaf make the queries, keys or values, where it makes other things too."""
        return None if self.nodes is None else reaching(leaf, self.nodes["qkv".index(part)])


class Region:
    """The part of the graph between one tensor and the calls that it was computed from."""

    def __init__(self, record: Trace, tensor: Tensor) -> None:
        self.record = record
        self.nodes: list[Node] = []
        seen: set[Node] = set()
        todo = [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen or node in record.stops:
                continue
            seen.add(node)
            self.nodes.append(node)
            todo += [following for following, _ in node.next_functions]

    def named(self, *words: str) -> list[Node]:
        """Nodes whose name contains one of the words, in the order in which they were computed."""
        found = [n for n in self.nodes if any(w in n.name() for w in words) and "Log" not in n.name()]
        return sorted(found, key=lambda n: n._sequence_nr())

    def leaves(self, node: Node | None) -> tuple[LeafCall, ...]:
        """The leaves behind a node."""
        return tuple(c for c in self.record.behind(node) if isinstance(c, LeafCall))

    def behind(self, node: Node, *, stop_at_products: bool = False) -> set[Node]:
        """The nodes that a node was computed from, itself among them."""
        seen: set[Node] = set()
        todo = [node]
        while todo:
            at = todo.pop()
            if at is None or at in seen or at in self.record.stops:
                continue
            seen.add(at)
            if stop_at_products and at.name() in PRODUCTS and at is not node:
                continue
            todo += [following for following, _ in at.next_functions]
        return seen


def attention_before(record: Trace, leaf: LeafCall) -> Found | None:
    """The attention whose result enters a leaf, if the graph before it shows one."""
    region = Region(record, leaf.x)
    for node in region.named("ScaledDotProduct"):
        sides = tuple(following for following, _ in node.next_functions[:3])
        q, k, v = (region.leaves(side) for side in sides)
        if q and k and v:
            size = node._saved_query.shape[-1]
            return Found(q, k, v, leaf, (sides[0], sides[1], sides[2]), size, causal=bool(node._saved_is_causal))
    for softmax in region.named("Softmax"):
        scores = _scores(region, softmax)
        values = _values(region, softmax)
        if scores is None or values is None:
            continue
        left, right = operands(scores)
        q, k, v = region.leaves(left), region.leaves(right), region.leaves(values)
        if q and k and v:
            shape = getattr(scores, SAVED[scores.name()][0]).shape
            stack = shape[0] if len(shape) == 3 else 0
            return Found(q, k, v, leaf, (left, right, values), shape[-1], stack, _is_causal(softmax))
    return None


def operands(product: Node) -> tuple[Node | None, Node | None]:
    """The two factors of a matrix product."""
    at = PRODUCTS[product.name()]
    return product.next_functions[at][0], product.next_functions[at + 1][0]


def _scores(region: Region, softmax: Node) -> Node | None:
    """The first product under the softmax whose factors both come from projections."""
    near = [n for n in region.behind(softmax, stop_at_products=True) if n.name() in PRODUCTS]
    for node in sorted(near, key=lambda n: n._sequence_nr()):
        left, right = operands(node)
        if region.leaves(left) and region.leaves(right):
            return node
    return None


def _values(region: Region, softmax: Node) -> Node | None:
    """The other factor of the first product that the softmax enters."""
    for node in sorted((n for n in region.nodes if n.name() in PRODUCTS), key=lambda n: n._sequence_nr()):
        left, right = operands(node)
        if left is None or right is None or node._sequence_nr() < softmax._sequence_nr():
            continue
        from_left, from_right = softmax in region.behind(left), softmax in region.behind(right)
        if from_left != from_right:
            return right if from_left else left
    return None


def _is_causal(softmax: Node) -> bool:
    """Whether the probabilities above the diagonal are zero."""
    weights = getattr(softmax, "_saved_result", None)
    if not isinstance(weights, Tensor) or weights.is_meta or weights.ndim < 2 or weights.shape[-2] < 2:
        return False
    rows, columns = weights.shape[-2:]
    return not bool((weights.ne(0) & later(rows, columns, weights.device)).any())


QUERY = re.compile(r"(^|_)(q|wq|query|queries)(_|$)")
KEY = re.compile(r"(^|_)(k|wk|key|keys)(_|$)")
VALUE = re.compile(r"(^|_)(v|wv|value|values)(_|$)")
PATTERNS = {"q": QUERY, "k": KEY, "v": VALUE}


def attention_by_name(calls: Iterable[LeafCall]) -> Found | None:
    """Queries, keys and values among the leaves of one module, told by their names; `query_key` is both."""
    found: dict[str, list[LeafCall]] = {"q": [], "k": [], "v": []}
    calls = list(calls)
    for call in calls:
        name = call.path.rsplit(".", 1)[-1]
        for letter, pattern in PATTERNS.items():
            if pattern.search(name):
                found[letter].append(call)
    q, k, v = (tuple(found[letter]) for letter in "qkv")
    if not (q and k and v) or len({c.path for c in (*q, *v)}) < 2:
        return None
    taken = {c.path for c in (*q, *k, *v)}
    last = [c for c in calls if c.path not in taken and c.order > max(call.order for call in v)]
    return Found(q[:1], k[:1], v[:1], last[-1] if last else None)


def heads(found: Found, widths: tuple[int, int, int], config: object) -> Heads:
    """The shapes of an attention from the widths of its queries, keys and values and the size of one key."""
    size = found.key_size
    wide, keys, values = widths
    if not size or wide % size:
        count = next((n for a in HEAD_COUNTS if isinstance(n := getattr(config, a, None), int)), 1)
        size = wide // count if count and wide % count == 0 else wide
    query = wide // size
    kv = keys // size if keys % size == 0 and keys >= size else query
    return Heads(query, kv, size, values // kv if values % kv == 0 else size, found.causal)


HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
