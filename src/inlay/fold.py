"""One module at a time: the weight that a module has once linear pieces are in it, and what storing it costs.

Everything is computed in fp32 (fp64 where the weight is) and rounded once to the form in which it is stored. Legend:
O, I features leaving and entering a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import InlayError, MergeError
from inlay.hosts.base import Host, Placed, hosted_class, is_intact, pristine_copy
from inlay.methods.base import Delta, Replacement
from inlay.quant.bridge import is_quantized, weight_of

PLAIN = {"Linear", "Linear4", "DenseLinear", "Linear4bit", "Linear8bitLt", "Conv1D", "Embedding", "LayerNorm"}
PLAIN |= {"Conv1d", "Conv2d", "Conv3d"}
"""Classes of modules known to apply `weight` and `bias` as they are; others are tried out."""

STORAGE = ("quant_state", "state", "quant_type", "block_size", "weight_dtype")
"""Attributes in which quantised layers keep what decodes their weight."""


class DenseLinear(nn.Linear):
    """Stands in for a quantised layer while a merged weight is kept dense: computes in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O) in the dtype of the input."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


@dataclass(frozen=True)
class Damage:
    """What storing a merged weight changed, as Frobenius norms: ‖Q(W + ΔW) − (W + ΔW)‖, ‖ΔW‖ and ‖W‖."""

    path: str
    error: float
    delta: float
    weight: float

    @property
    def ratio(self) -> float:
        """The error relative to what the adapter learned; above 1 the merge destroys more than the adapter added."""
        return self.error / self.delta if self.delta else float("inf") if self.error else 0.0


@dataclass(eq=False)
class Fold:
    """What a module gets: tensors by name, and a class and attributes where its storage changes."""

    path: str
    pieces: list[Placed]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor | None] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    base: type[nn.Module] | None = None
    damage: Damage | None = None


class Version:
    """The version counter of a tensor. Copies of a tensor count anew, so a copy or a pickle of this knows none."""

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.count = None if tensor is None else tensor._version

    def passed(self, tensor: Tensor) -> bool:
        """Whether the tensor was written to since."""
        return self.count is not None and tensor._version != self.count

    def __reduce__(self) -> tuple[type[Version], tuple[()]]:
        return Version, ()


@dataclass(eq=False)
class Saved:
    """What a module was, and the tensors that stand there instead, with their versions."""

    base: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    attributes: dict[str, Any]
    added: tuple[str, ...]
    installed: dict[str, tuple[nn.Parameter, torch.dtype, Version]]


@torch.no_grad()
def fold(
    path: str,
    module: nn.Module,
    pieces: Sequence[Placed],
    to: torch.dtype | None,
    requantise: bool,
    memo: dict[int, Any],
) -> Fold:
    """What `module` becomes with these pieces in it, in their order; the module itself is not touched.

    Args:
        path: its name, for messages.
        module: a hosted module.
        pieces: linear pieces and at most one replacement.
        to: the dtype to keep a quantised weight in, densely.
        requantise: store a quantised weight in its own format again.
        memo: replaced tensors by id, so that tied ones stay tied.

    Raises:
        MergeError: the module is quantised and neither was asked for; it does not apply its weight as a linear map; or
            a piece turns out not to be linear.
    """
    new = Fold(path, list(pieces))
    source = module
    for placed in pieces:
        if isinstance(placed.piece, Replacement):
            source = _copied(path, placed.piece)
            _take_over(new, module, source, memo)
    deltas = [p for p in pieces if isinstance(p.piece, Delta)]
    if not deltas:
        return new
    old_b = _tensor(source, "bias")
    bias = None if old_b is None else old_b.detach().to(_high(old_b))
    if all(_only_shifts(p) for p in deltas):
        for placed in deltas:
            assert isinstance(placed.piece, Delta)
            bias = _add_at(bias, placed.piece.bias_delta(), placed, _width(module, placed))
    else:
        old_w = _readable(path, source, module)
        weight_OI = old_w.to(_high(old_w))
        folded_OI, bias = _through(weight_OI, bias, deltas)
        _store_weight(new, module, weight_OI, folded_OI, to, requantise)
    if bias is not None:
        _store_bias(new, module, bias)
    cls = type(source).base if isinstance(source, Host) else type(source)
    if cls.__name__ not in PLAIN and cls.forward not in (nn.Linear.forward, nn.Embedding.forward):
        _try_out(path, source, new)
    return new


def _through(weight_OI: Tensor, bias_O: Tensor | None, deltas: Sequence[Placed]) -> tuple[Tensor, Tensor | None]:
    """The map after all pieces: first those that act on what leaves, then those that act on what enters."""
    frozen = weight_OI, bias_O
    for placed in (p for p in deltas if p.site.tap == "output"):
        piece = placed.piece
        assert isinstance(piece, Delta)
        own_w, own_b = frozen if piece.needs_frozen else (weight_OI, bias_O)
        rows = _rows(placed, weight_OI)
        part_w, part_b = own_w[rows], None if own_b is None else own_b[rows]
        new_w, new_b = piece.fold(part_w, part_b)
        if piece.needs_frozen:
            new_w = weight_OI[rows] + (new_w - part_w)
            if new_b is not None and bias_O is not None:
                new_b = bias_O[rows] + (new_b if part_b is None else new_b - part_b)
        if placed.site.columns is None:
            weight_OI, bias_O = new_w, new_b
            continue
        weight_OI = weight_OI.index_copy(0, rows, new_w)
        if new_b is not None:
            bias_O = weight_OI.new_zeros(weight_OI.shape[0]) if bias_O is None else bias_O
            bias_O = bias_O.index_copy(0, rows, new_b.to(bias_O))
    for placed in (p for p in reversed(deltas) if p.site.tap == "input"):
        assert isinstance(placed.piece, Delta)
        weight_OI, bias_O = placed.piece.fold_input(weight_OI, bias_O)
    return weight_OI, bias_O


def _rows(placed: Placed, weight_OI: Tensor) -> Any:
    """The features of the module that a piece writes: all, or its own where several sites share a fused module."""
    if placed.site.columns is None:
        return slice(None)
    return torch.cat([torch.arange(lo, hi, device=weight_OI.device) for lo, hi in placed.site.columns])


def _only_shifts(placed: Placed) -> bool:
    piece = placed.piece
    if not isinstance(piece, Delta) or placed.site.tap != "output" or type(piece).fold is not Delta.fold:
        return False
    delta = piece.weight_delta()
    return delta.ndim == 0 and not bool(delta)


def _add_at(bias: Tensor | None, shift: Tensor | None, placed: Placed, width: int) -> Tensor | None:
    if shift is None:
        return bias
    whole = shift.to(_high(shift))
    if placed.site.columns is not None:
        whole = whole.new_zeros(width).index_copy(0, _rows(placed, whole), whole)
    return whole if bias is None else bias + whole


def _width(module: nn.Module, placed: Placed) -> int:
    bias = _tensor(module, "bias")
    if bias is not None:
        return bias.numel()
    if placed.site.columns is None:
        return placed.site.out_features
    return int(getattr(module, "out_features", placed.site.out_features))


def _copied(path: str, piece: Replacement) -> nn.Module:
    module = getattr(piece, "module", None)
    if not isinstance(module, nn.Module):
        raise MergeError(f"{path}: a {type(piece).__name__} keeps no copy of the module to swap in.")
    return module


def _take_over(new: Fold, module: nn.Module, copy: nn.Module, memo: dict[int, Any]) -> None:
    """The tensors of a trained copy, in the dtypes of the module's own."""
    for name, value in copy.named_parameters():
        if "." in name:
            raise MergeError(f"{new.path}: the copy has modules of its own ({name}), so it cannot be swapped in.")
        own = module._parameters.get(name)
        dtype = own.dtype if own is not None and own.is_floating_point() else value.dtype
        key = id(value)
        if key not in memo:
            memo[key] = nn.Parameter(value.detach().to(dtype, copy=True), requires_grad=False)
        new.parameters[name] = memo[key]
    for name, buffer in copy.named_buffers():
        new.buffers[name] = buffer.detach().clone()
    for name in ("in_features", "out_features", "num_embeddings"):
        if name in copy.__dict__ and copy.__dict__[name] != module.__dict__.get(name):
            new.attributes[name] = copy.__dict__[name]


def _readable(path: str, source: nn.Module, module: nn.Module) -> Tensor:
    try:
        return weight_of(source)
    except InlayError as error:
        raise MergeError(f"{path}: {error}") from error


def _store_weight(
    new: Fold, module: nn.Module, weight_OI: Tensor, folded_OI: Tensor, to: torch.dtype | None, requantise: bool
) -> None:
    own = _tensor(module, "weight")
    assert own is not None
    if not is_quantized(module):
        exact = folded_OI.to(own.dtype)
        held = exact.t() if _transposed(module) else exact
        if own.ndim != 2:
            if int(getattr(module, "groups", 1)) > 1:
                raise MergeError(
                    f"{new.path} projects {module.groups} groups of features apart from each other, and the adapter "
                    "joins them, so its weight has no room for the merge. Keep the adapter attached."
                )
            held = held.reshape(own.shape)
        new.parameters["weight"] = nn.Parameter(held.contiguous(), requires_grad=False)
    elif to is not None:
        exact = folded_OI.to(to)
        new.parameters["weight"] = nn.Parameter(exact, requires_grad=False)
        new.base = DenseLinear
    elif requantise:
        exact = _requantise(new, module, folded_OI)
    else:
        raise MergeError(
            f"{new.path} is stored quantised ({type(own).__name__}, {type(module).__name__}): a merge would be rounded "
            'to its few bits. merge(to="bf16") merges exactly into a dense copy of the weight; merge(requantise=True) '
            "rounds, and measures the damage."
        )
    error, delta = float((exact.to(folded_OI) - folded_OI).norm()), float((folded_OI - weight_OI).norm())
    new.damage = Damage(new.path, error, delta, float(weight_OI.norm()))


def _requantise(new: Fold, module: nn.Module, folded_OI: Tensor) -> Tensor:
    """Tries it on a copy, and takes what that came to hold."""
    from inlay.quant.replace import requantise as store

    trial: Any = pristine_copy(module, {})
    try:
        store(trial, folded_OI)
    except InlayError as error:
        raise MergeError(f'{new.path}: {error}. merge(to="bf16") keeps a dense copy instead.') from error
    weight: Any = trial.weight
    new.parameters["weight"] = weight
    if getattr(weight, "module", None) is trial:
        weight.module = module
    new.buffers |= trial._buffers
    new.attributes |= {n: trial.__dict__[n] for n in STORAGE if n in trial.__dict__}
    return weight_of(trial)


def _store_bias(new: Fold, module: nn.Module, bias_O: Tensor) -> None:
    if "bias" not in module._parameters:
        raise MergeError(
            f"{new.path} is a {type(module).__name__}, which has no place for a bias, so none can be merged."
        )
    own, weight = module._parameters["bias"], _tensor(module, "weight")
    like = own if own is not None else new.parameters.get("weight", weight)
    assert like is not None
    dtype = like.dtype if like.is_floating_point() and like.element_size() > 1 else torch.float32
    new.parameters["bias"] = nn.Parameter(bias_O.to(dtype), requires_grad=False)


def _try_out(path: str, source: nn.Module, new: Fold) -> None:
    """Runs an unknown kind of module on a few random values, before and after, and compares with ΔW and Δb."""
    trial: Any = pristine_copy(source, {}).float().eval()
    names = [n for n in ("weight", "bias") if n in new.parameters]
    before = {n: trial._parameters.get(n) for n in names}
    after = {n: nn.Parameter(new.parameters[n].detach().float(), requires_grad=False) for n in names}
    generator = torch.Generator().manual_seed(0)
    shift_O = after["bias"] - (0 if before["bias"] is None else before["bias"]) if "bias" in after else None
    try:
        if isinstance(trial, nn.Embedding):
            x = torch.randint(0, trial.num_embeddings, (1, 5), generator=generator).to(trial.weight.device)
            wanted = trial(x) + _output_scale(trial) * F.embedding(x, after["weight"] - trial.weight)
        else:
            device = next(iter(new.parameters.values())).device
            width = weight_of(trial).shape[1] if "weight" in names else trial.weight.shape[-1]
            x = torch.randn(1, 5, width, generator=generator).to(device)
            wanted = trial(x)
            if "weight" in names:
                was = weight_of(trial)
                trial._parameters["weight"] = after["weight"]
                wanted = wanted + F.linear(x, weight_of(trial) - was)
            if shift_O is not None:
                wanted = wanted + shift_O
        trial._parameters.update(after)
        found = trial(x)
    except Exception as error:
        raise MergeError(f"{path} is a {type(source).__name__}, which could not be tried out: {error}") from error
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        raise MergeError(
            f"{path} is a {type(source).__name__}, which does not apply its weight and bias as they are, so a "
            "merged weight would not act as the adapter does."
        )


def install(module: nn.Module, new: Fold) -> Saved:
    """Puts the folded tensors in place of a module's own, which are kept as the objects that they are."""
    cls: Any = type(module)
    saved = Saved(
        base=cls.base,
        parameters=dict(module._parameters),
        buffers=dict(module._buffers),
        attributes={n: module.__dict__[n] for n in new.attributes if n in module.__dict__},
        added=tuple(n for n in new.attributes if n not in module.__dict__),
        installed={n: (p, p.dtype, Version(p)) for n, p in new.parameters.items()},
    )
    if new.base is not None:
        module.__class__ = hosted_class(cls.host, new.base)
    module._parameters.update(new.parameters)
    module._buffers.update(new.buffers)
    module.__dict__.update(new.attributes)
    return saved


def changed(module: nn.Module, saved: Saved) -> bool:
    """Whether something else put other tensors or values, or another class, in the place of the merged ones."""
    return not is_intact(module) or any(
        module._parameters.get(n) is not p or version.passed(p) for n, (p, _, version) in saved.installed.items()
    )


def restore(module: nn.Module, saved: Saved) -> None:
    """Puts back what `install` kept, following the module to where it was moved or cast since."""
    moved = next(iter(saved.installed.values()), None)
    for name, (parameter, dtype, _) in saved.installed.items():
        own = saved.parameters.get(name)
        if own is not None and (own.device != parameter.device or parameter.dtype != dtype):
            cast = parameter.dtype if parameter.dtype != dtype and own.is_floating_point() else own.dtype
            own.data = own.data.to(parameter.device, cast)
    for name, buffer in saved.buffers.items():
        if buffer is not None and moved is not None and buffer.device != moved[0].device:
            saved.buffers[name] = buffer.to(moved[0].device)
    cls: Any = type(module)
    module.__class__ = hosted_class(cls.host, saved.base)
    module._parameters.clear()
    module._parameters.update(saved.parameters)
    module._buffers.clear()
    module._buffers.update(saved.buffers)
    for name in saved.added:
        module.__dict__.pop(name, None)
    module.__dict__.update(saved.attributes)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _high(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _output_scale(module: nn.Module) -> float:
    """What some token embeddings multiply their rows by."""
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return 1.0 if scale is None or not isinstance(module, nn.Embedding) else float(scale)
