"""Finds the anatomy of a model by running it once on a few tokens.

Each projection's output is cut loose from the autograd graph and remembered. What then reaches the attention function
as q, k, v leads back along the graph to exactly the projections that made it; the projection that consumes the
attention's result is `o`; the projections of the same block that belong to no attention are the feed-forward span.
Nothing here knows a model family.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Columns, Heads, Kind, Leaf

PROBE = "inlay_probe"
TOKENS = 5


@dataclass(eq=False)
class LeafCall:
    """One call of a leaf: what it was given, what it gave."""

    path: str
    order: int
    x: Tensor
    y: Tensor


@dataclass(eq=False)
class AttentionCall:
    """One call of the attention function, with the tensors that reached it."""

    path: str
    order: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    cross: bool
    causal: bool
    window: int | None


@dataclass
class Trace:
    """Everything that one run showed."""

    leaves: list[LeafCall] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    dropouts: list[LeafCall] = field(default_factory=list)
    tags: dict[int, LeafCall | AttentionCall] = field(default_factory=dict)
    norms: dict[object, LeafCall] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)
    walked: dict[tuple[int, bool], list[LeafCall | AttentionCall]] = field(default_factory=dict)

    def sources(self, tensor: Tensor, *, stop_at_norms: bool = False) -> list[LeafCall | AttentionCall]:
        """The nearest remembered calls that `tensor` was computed from, without passing through another."""
        if id(tensor) in self.tags:
            return [self.tags[id(tensor)]]
        key = id(tensor), stop_at_norms
        if key not in self.walked:
            self.walked[key] = self._walk(tensor, stop_at_norms)
        return self.walked[key]

    def _walk(self, tensor: Tensor, stop_at_norms: bool) -> list[LeafCall | AttentionCall]:
        found: dict[int, LeafCall | AttentionCall] = {}
        seen: set[object] = set()
        todo = [tensor.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if stop_at_norms and node in self.norms:
                call = self.norms[node]
                found[id(call)] = call
                continue
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.tags:
                call_or_attention = self.tags[id(variable)]
                found[id(call_or_attention)] = call_or_attention
            todo += [following for following, _ in node.next_functions]
        return sorted(found.values(), key=lambda c: c.order)


def children_of(module: nn.Module) -> list[nn.Module]:
    """The module's own children, without the pieces that a host carries."""
    return [child for name, child in module.named_children() if name != "inlay"]


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, without the pieces that hosts carry."""
    for path, module in model.named_modules():
        if "inlay" not in path.split("."):
            yield path, module


def leaf_kind(module: nn.Module) -> Kind | None:
    """What a childless module is: "linear", "norm", "embedding", "module", or None where it holds no parameters."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return None
    weight = own.get("weight")
    if weight is not None and weight.ndim == 2 and "qweight" not in own:
        return "linear" if len(own) <= 2 and set(own) <= {"weight", "bias"} else "module"
    if all(p.ndim <= 1 for p in own.values()):
        return "norm"
    return "module"


def static_leaves(model: nn.Module) -> dict[str, Leaf]:
    """All leaves of the model with the shapes that their weights tell."""
    from inlay.quant.bridge import logical_shape

    leaves: dict[str, Leaf] = {}
    for path, module in modules_of(model):
        kind = leaf_kind(module) if path and not children_of(module) else None
        if kind is None:
            continue
        bias = isinstance(getattr(module, "bias", None), Tensor)
        if kind == "linear":
            out, inn = logical_shape(module)
        elif kind == "embedding":
            inn, out = module.weight.shape if isinstance(module.weight, Tensor) else (0, 0)
        else:
            size = next(module.parameters()).shape[-1] if next(module.parameters()).ndim else 1
            inn = out = size
        leaves[path] = Leaf(path, kind, int(inn), int(out), bias)
    return leaves


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A few tokens that any text model of transformers accepts.

    Raises:
        TypeError: the model has no `config`, so nobody but its author knows what to feed it.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"{type(model).__name__} has no config: pass example inputs.")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = int(getattr(text, "vocab_size", 0) or getattr(config, "vocab_size", 0) or 2)
    special = {getattr(config, n, None) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    plain = [i for i in range(min(vocab, 64)) if i not in special] or [0]
    ids = [plain[i % len(plain)] for i in range(TOKENS)]
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < vocab:
        ids[-1] = eos
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.tensor([ids], device=device)
    inputs = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens[:, : TOKENS - 1] if not sequence_head(model) else tokens
    return inputs


def sequence_head(model: nn.Module) -> bool:
    """Whether the head reads the sentence at its end-of-sequence token (BART and T5 classifiers)."""
    return "SequenceClassification" in type(model).__name__


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Runs the model once and records every leaf and attention call.

    The model is left as it was: mode, random state, hooks, attention implementation, gradients.
    """
    record, count = Trace(), itertools.count()
    inputs = example_inputs(model) if inputs is None else inputs
    with contextlib.ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_leaf_hooks(model, record, count))
        stack.enter_context(_attention_probe(model, record, count))
        if hasattr(model, "config"):
            inputs = {**inputs}
            if "use_cache" not in inputs and getattr(model.config, "use_cache", None) is not None:
                inputs["use_cache"] = False
        model(**inputs)
    return record


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _leaf_hooks(model: nn.Module, record: Trace, count: Iterator[int]) -> Iterator[None]:
    handles = []

    def cut(path: str, kind: Kind) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if x is None or not isinstance(y, Tensor):
                return None
            call = LeafCall(path, next(count), x, y)
            record.leaves.append(call)
            if kind == "norm":
                if y.grad_fn is not None:
                    record.norms[y.grad_fn] = call
                    record.keep.append(y.grad_fn)
                return None
            call.y = y.detach()
            if call.y.is_floating_point():
                call.y.requires_grad_()
            record.tags[id(call.y)] = call
            return call.y

        return hook

    def drop(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                record.dropouts.append(LeafCall(path, next(count), args[0], y))

        return hook

    for path, module in modules_of(model):
        if not path or children_of(module):
            continue
        kind = leaf_kind(module)
        if kind is not None:
            handles.append(module.register_forward_hook(cut(path, kind), with_kwargs=True))
        elif type(module).__name__.endswith("Dropout"):
            handles.append(module.register_forward_hook(drop(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _attention_probe(model: nn.Module, record: Trace, count: Iterator[int]) -> Iterator[None]:
    """Puts a recording attention function under every config of the model."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
    except ImportError:
        yield
        return
    paths = {id(module): path for path, module in modules_of(model)}

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, **kw: Any
    ) -> tuple[Tensor, None]:
        weights = torch.zeros((), dtype=q.dtype, device=q.device)
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]) + weights
        out.requires_grad_()
        causal = kw.get("is_causal")
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
        window = kw.get("sliding_window") or getattr(module, "sliding_window", None)
        call = AttentionCall(
            paths.get(id(module), "?"),
            next(count),
            q,
            k,
            v,
            out,
            False,
            causal,
            window if isinstance(window, int) else None,
        )
        record.attentions.append(call)
        record.tags[id(out)] = call
        return out, None

    AttentionInterface.register(PROBE, attend)
    AttentionMaskInterface.register(PROBE, eager_mask)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {i: c for i, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    before = {i: c._attn_implementation_internal for i, c in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = PROBE
    try:
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation_internal = before[i]
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)


def fused_columns(call: LeafCall, parts: Mapping[str, Tensor]) -> dict[str, Columns | None]:
    """Which output features of a leaf reach q, k and v, as ranges; None where a part takes all of them.

    The gradient of a part with respect to the leaf's output is non-zero exactly at the features it was made from.
    """
    found: dict[str, Columns | None] = {}
    for name, part in parts.items():
        seed = torch.randn(part.shape, dtype=part.dtype, device=part.device)
        with torch.no_grad():
            (grad,) = torch.autograd.grad(part, call.y, seed, retain_graph=True, allow_unused=True)
        if grad is None:
            continue
        used = grad.reshape(-1, grad.shape[-1]).ne(0).any(0).tolist()
        found[name] = None if all(used) else _ranges(used)
    return found


def _ranges(used: list[bool]) -> Columns:
    ranges, start = [], None
    for i, flag in enumerate([*used, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            ranges.append((start, i))
            start = None
    return tuple(ranges)


def heads_of(call: AttentionCall) -> Heads:
    """The shapes that one attention call showed."""
    return Heads(call.q.shape[1], call.k.shape[1], call.k.shape[-1], call.v.shape[-1], call.causal, call.window)
