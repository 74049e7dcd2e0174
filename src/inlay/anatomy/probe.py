"""Runs a model once on a few tokens and records what happens.

Each projection's output is cut loose from the autograd graph and remembered (see `graph`). The projections themselves
are not computed: noise of the right shape takes the place of their output, because only shapes and the graph matter.
So a run costs the same for dense, quantised and memory-mapped weights, and works on the meta device.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay.anatomy.base import Axis, Kind
from inlay.anatomy.examples import candidates
from inlay.anatomy.graph import AttentionCall, LeafCall, ModuleCall, Trace, later
from inlay.anatomy.tree import children_of, feature_axis, inside, leaf_kind, modules_of, static_leaves

PROBE = "inlay_probe"
MOST_NOISE = 200_000
"""Larger outputs (those of an output embedding) are zeros, which cost nothing."""


def trace(model: nn.Module, example: Mapping[str, Any] | None = None) -> Trace:
    """Runs the model once and records every call of a leaf, of a module and of the attention function.

    The model is left as it was: mode, random state, hooks, attention implementation, gradients.

    Args:
        model: any module.
        example: keyword arguments of one forward pass. Without them the inputs that most models take are tried.

    Raises:
        Exception: whatever the model raises on the example, or on the last of the inputs tried.
    """
    tried = [dict(example)] if example is not None else candidates(model)
    for i, inputs in enumerate(tried):
        try:
            record = _run(model, inputs)
        except Exception:
            if i == len(tried) - 1:
                raise
        else:
            record.bypassed = _read_directly(model, inputs, record)
            return record
    raise TypeError(f"it is not known what to feed a {type(model).__name__}; pass an example")


def _run(model: nn.Module, inputs: dict[str, Any]) -> Trace:
    first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim), None)
    record, count = Trace(batch=1 if first is None else first.shape[0]), itertools.count()
    modules = list(modules_of(model))
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_it_was(model, modules))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_listening(modules, record, count))
        stack.enter_context(_attention_probe(modules, record, count))
        record.outputs = list(tensors_in(model(**inputs)))
    record.settle()
    return record


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


class _Watch(TorchFunctionMode):
    """Notes which of some tensors are computed with, outside of the leaf `inside`."""

    ASKED = ("T", "mT", "data")

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched, self.seen, self.inside = watched, set[str](), ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Looking at a shape, dtype or device is no use of the values.
        looks = getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") not in self.ASKED
        if not looks:
            given = [*args, *(kwargs or {}).values()]
            for value in (*given, *(i for g in given if isinstance(g, tuple | list) for i in g)):
                path = self.watched.get(id(value))
                if path is not None and path != self.inside:
                    self.seen.add(path)
        return func(*args, **(kwargs or {}))


def _read_directly(model: nn.Module, inputs: dict[str, Any], record: Trace) -> set[str]:
    """Leaves whose weights the module around them uses itself, mostly without calling them."""
    unusual = {call.path for call in record.leaves if call.kind == "module"}
    ran = {call.path for call in record.leaves} - unusual
    around = {call.path for call in record.modules}
    modules = dict(modules_of(model))
    used = {id(p) for path in ran for p in modules[path]._parameters.values()}
    idle = [p for p in modules if p not in ran and p.rpartition(".")[0] in around and leaf_kind(modules[p]) is not None]
    watched = {id(t): p for p in idle for t in modules[p]._parameters.values() if t is not None and id(t) not in used}
    if not watched:
        return set()
    watch = _Watch(watched)

    def entered(path: str) -> Callable[..., None]:
        return lambda *_: setattr(watch, "inside", path)

    handles = [modules[p].register_forward_pre_hook(entered(p)) for p in unusual]
    handles += [modules[p].register_forward_hook(entered("")) for p in unusual]
    try:
        with as_it_was(model, list(modules.items())), torch.random.fork_rng(devices=[]), torch.no_grad(), watch:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return watch.seen


@contextlib.contextmanager
def as_it_was(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Evaluation mode, adapters idle and compiled forwards set aside; all of it put back afterwards."""
    training = [m for m in model.modules() if m.training]
    hosted = [state for _, m in modules if (state := m.__dict__.get("_inlay")) is not None]
    compiled = [(m, m._compiled_call_impl) for _, m in modules if getattr(m, "_compiled_call_impl", None) is not None]
    plans = [state.plan for state in hosted]
    route = model.__dict__.get("_inlay_state")
    batch = None if route is None else route.batch
    model.eval()
    try:
        for state in hosted:
            state.plan = None
        for module, _ in compiled:
            module._compiled_call_impl = None
        if route is not None:
            route.batch = None
        yield
    finally:
        for state, plan in zip(hosted, plans, strict=True):
            state.plan = plan
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        if route is not None:
            route.batch = batch
        for module in training:
            module.training = True


@contextlib.contextmanager
def _listening(modules: list[tuple[str, nn.Module]], record: Trace, count: Iterator[int]) -> Iterator[None]:
    """Records calls: idle projections get a forward that makes noise, everything else a hook."""
    handles: list[Any] = []
    idle: list[nn.Module] = []
    lists = {path for path, module in modules if isinstance(module, nn.ModuleList | nn.Sequential)}
    try:
        for path, module in modules:
            kind = leaf_kind(module)
            if kind is None:
                repeated = path.rpartition(".")[0] in lists and bool(children_of(module))
                hook = _module_hook(record, count, path, repeated)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            elif kind == "linear" and "forward" not in module.__dict__ and _is_plain(module):
                module.__dict__["forward"] = _noise(record, count, path, module)
                idle.append(module)
            else:
                experts = "expert" in f"{path} {type(module).__name__}".lower()
                hook = _leaf_hook(record, count, path, kind, _is_norm(path, module), experts, feature_axis(module))
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in idle:
            del module.__dict__["forward"]


def _is_plain(module: nn.Module) -> bool:
    """Whether a projection does nothing but y = W x + b, so that the shape of y is known without computing it."""
    from inlay.quant.bridge import is_quantized

    forward = getattr(type(module), "base", type(module)).forward
    return forward is nn.Linear.forward or forward.__qualname__ == "Conv1D.forward" or is_quantized(module)


def _is_norm(path: str, module: nn.Module) -> bool:
    words = type(module).__name__.lower(), path.rsplit(".", 1)[-1].lower()
    return "norm" in words[0] or "norm" in words[1] or words[1].startswith("ln")


def _hides_future(mask: Tensor) -> bool | None:
    """Whether a mask of [.., T, T] shuts out all later tokens; None where it does not say."""
    if mask.is_meta or mask.ndim != 4 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return None
    seen = mask if mask.dtype == torch.bool else mask >= 0
    return not bool((seen & later(mask.shape[-2], mask.shape[-1], mask.device)).any())


Hook = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any]


def _first(values: Any) -> Tensor | None:
    """The first tensor of numbers among arguments or results, else the first tensor."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    return next((t for t in tensors if t.is_floating_point()), tensors[0] if tensors else None)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _result(y: Any) -> Tensor | None:
    if isinstance(y, Tensor):
        return y
    return _first(y.values() if isinstance(y, Mapping) else y if isinstance(y, tuple | list) else ())


def _cut(record: Trace, call: LeafCall, y: Tensor) -> Tensor:
    """y as the start of a new graph. The model goes on with a copy, so that it may change it in place."""
    call.cut = y.detach()
    if not call.cut.is_floating_point():
        return y
    if not torch.is_grad_enabled():
        record.silent.append(call)
        return y
    call.cut.requires_grad_()
    call.y = call.cut.clone()
    record.stops[call.y.grad_fn] = call
    record.leaves.append(call)
    record.times[call.path].append(call.order)
    return call.y


def _noise(record: Trace, count: Iterator[int], path: str, module: nn.Module) -> Callable[..., Tensor]:
    from inlay.quant.bridge import logical_shape

    out = logical_shape(module)[0]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = _given(args, kwargs)
        if x is None or not x.is_floating_point():
            raise TypeError(f"{path} was called without a tensor of numbers")
        shape = (*x.shape[:-1], out)
        many = x.shape.numel() // x.shape[-1] * out > MOST_NOISE
        y = x.new_zeros(shape) if many else torch.randn(shape, dtype=x.dtype, device=x.device)
        return _cut(record, LeafCall(path, next(count), x, y), y)

    return forward


def _leaf_hook(
    record: Trace, count: Iterator[int], path: str, kind: Kind, norm: bool, experts: bool, axis: Axis
) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        x, y = _given(args, kwargs), _result(result)
        if x is None or y is None:
            return None
        others = tuple(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not x)
        call = LeafCall(path, next(count), x, y, kind, axis, others=others)
        several = kind == "module" and not isinstance(result, Tensor)
        if kind == "norm" or several or (kind == "module" and y.shape == x.shape and not experts):
            # No projection, only something with parameters of its own: what it is made from still counts.
            call.results = tuple(tensors_in(result))
            (record.leaves if torch.is_grad_enabled() else record.silent).append(call)
            if kind == "norm" and norm and y.grad_fn is not None:
                record.norms[y.grad_fn] = call
            return None
        cut = _cut(record, call, y)
        if isinstance(result, Tensor):
            return cut
        if isinstance(result, tuple | list):
            return type(result)(cut if item is y else item for item in result)
        return None

    return hook


def _module_hook(record: Trace, count: Iterator[int], path: str, repeated: bool) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        x, y = _given(args, kwargs), _result(result)
        if x is None or y is None:
            return
        call = ModuleCall(path, next(count), x, y, module, args, kwargs)
        if not torch.is_grad_enabled():
            record.silent.append(call)
            return
        record.modules.append(call)
        if "Dropout" in type(module).__name__:
            record.times[path].append(call.order)
            record.dropouts[id(x)] = call
        new = repeated and y.grad_fn is not None and y.grad_fn not in record.stops
        if new and not record.comes_from_within(call, path):
            record.mark(call)

    return hook


@contextlib.contextmanager
def _attention_probe(modules: list[tuple[str, nn.Module]], record: Trace, count: Iterator[int]) -> Iterator[None]:
    """Puts a recording attention function under every config of the model."""
    configs = {id(c): c for _, m in modules if (c := m.__dict__.get("config")) is not None}
    configs = {i: c for i, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    if not configs:
        yield
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    paths = {id(module): path for path, module in modules}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kw: Any
    ) -> tuple[Tensor, None]:
        q, k, v = query, key, value  # some models pass them by these names
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).requires_grad_().clone()
        if not torch.is_grad_enabled():
            return out, None
        causal = kw.get("is_causal")
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
        hidden = None if attention_mask is None else _hides_future(attention_mask)
        causal = causal if hidden is None else hidden
        window = kw.get("sliding_window") or getattr(module, "sliding_window", None)
        window = window if isinstance(window, int) else None
        others = tuple(t for t in (attention_mask, *kw.values()) if isinstance(t, Tensor))
        call = AttentionCall(paths.get(id(module), "?"), next(count), q, out, k, v, causal, window, others)
        record.attentions.append(call)
        record.stops[out.grad_fn] = call
        return out, None

    AttentionInterface.register(PROBE, attend)
    AttentionMaskInterface.register(PROBE, eager_mask)
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


__all__ = ["PROBE", "as_it_was", "children_of", "inside", "modules_of", "static_leaves", "trace"]
