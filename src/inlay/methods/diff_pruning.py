"""Diff pruning: a sparse difference to the frozen weights, whose sparsity is learned through gates.

Legend: B batch, T tokens, I / O features entering / leaving a site, N entries of a tensor, K entries kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.memo import Memo, versions
from inlay.methods.base import Delta, Frozen, Method
from inlay.stepping import Stepped, watch

if TYPE_CHECKING:
    from inlay.adapter import Adapter


class GatedDiff(nn.Module):
    """z * d for one tensor of any shape: d is the difference, z its gates, from a hard concrete distribution.

    With a in `gate` and u uniform in (0, 1), z = clamp(σ(log u - log(1 - u) + a) (high - low) + low, 0, 1) in training
    and clamp(σ(a) (high - low) + low, 0, 1) otherwise. A structured one has one more gate that multiplies all.
    """

    def __init__(self, shape: tuple[int, ...], method: DiffPruning) -> None:
        super().__init__()
        self.low, self.high = method.low, method.high
        self.value = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.gate = nn.Parameter(torch.full(shape, method.gate_init, dtype=torch.float32))
        self.group = (
            nn.Parameter(torch.full((1,), method.gate_init, dtype=torch.float32)) if method.structured else None
        )
        self._mean = Memo[Tensor]()

    def gates(self) -> list[nn.Parameter]:
        """The parameters of all gates."""
        return [self.gate] if self.group is None else [self.gate, self.group]

    def forward(self) -> Tensor:
        if self.training:
            return self._gated(sample=True)
        if torch.is_grad_enabled() and self.value.requires_grad:
            return self.mean()
        return self._mean.get(lambda: versions(self.value, *self.gates()), self.mean)

    def mean(self) -> Tensor:
        """z * d without noise."""
        return self._gated(sample=False)

    def _gated(self, sample: bool) -> Tensor:
        gated = self.value * self._z(self.gate, sample)
        return gated if self.group is None else gated * self._z(self.group, sample)

    def _z(self, a: Tensor, sample: bool) -> Tensor:
        if sample:
            u = torch.rand_like(a).clamp(1e-4, 1 - 1e-4)
            a = u.log() - (1 - u).log() + a
        return (torch.sigmoid(a) * (self.high - self.low) + self.low).clamp(0.0, 1.0)

    @property
    def fixed(self) -> bool:
        """Whether the mask is fixed: gates that are open or shut for good have the parameter +∞ or -∞."""
        return not self.gate.is_meta and bool(self.gate.isinf().all())

    def fix(self, kept: Tensor) -> None:
        """Opens these gates for good and shuts the others; d takes the value that acted until now."""
        with torch.no_grad():
            self.value.copy_(torch.where(kept, self.mean(), 0.0))
            self.gate.copy_(torch.where(kept, torch.inf, -torch.inf))
            if self.group is not None:
                self.group.fill_(torch.inf)
        for gate in self.gates():
            gate.requires_grad_(False)

    def stored(self) -> dict[str, Tensor]:
        """Indices and values of the kept entries; of an unfixed one, all values and all gates."""
        value, gate = self.value.detach().flatten(), self.gate.detach().flatten()
        index = torch.int32 if value.numel() <= torch.iinfo(torch.int32).max else torch.int64
        if self.fixed:
            kept = (gate > 0).nonzero().squeeze(1)
            found = {"indices": kept.to(index), "values": value[kept], "gates": gate[:0]}
        else:
            found = {"indices": torch.empty(0, dtype=index, device=gate.device), "values": value, "gates": gate}
        return found if self.group is None else {**found, "group": self.group.detach()}

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave."""
        indices, values, gates = tensors["indices"].long(), tensors["values"], tensors["gates"]
        count = self.value.numel()
        dense = gates.numel() == values.numel() == count and not indices.numel()
        sparse = not gates.numel() and values.shape == indices.shape
        if not (dense or sparse) or (indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count):
            raise MethodError(f"the stored difference does not fit a tensor of shape {tuple(self.value.shape)}.")
        with torch.no_grad():
            if self.group is not None:
                self.group.copy_(tensors["group"])
            if dense:
                self.value.copy_(values.view_as(self.value))
                self.gate.copy_(gates.view_as(self.gate))
                return
            kept = torch.zeros(count, dtype=torch.bool, device=self.gate.device)
            kept[indices.to(kept.device)] = True
            self.fix(kept.view_as(self.gate))
            self.value.zero_().view(-1)[indices.to(kept.device)] = values.to(self.value)


class DiffPruningDelta(Stepped, Delta):
    """Δ(x) = x (z_W * dW)ᵀ + z_b * db, with dW of shape (O, I) and db (O,) where the frozen module has a bias.

    The penalty's gradient is added in front of every optimizer step that updates the gates.
    """

    def __init__(self, site: Site, frozen: Frozen, method: DiffPruning) -> None:
        super().__init__()
        self.penalty, self.rate = method.penalty, method.gate_lr
        self.output_scale = frozen.output_scale
        self.embedding = site.kind == "embedding"
        self.W = GatedDiff((site.out_features, site.in_features), method)
        self.b = GatedDiff((site.out_features,), method) if site.has_bias else None
        watch(self)

    def diffs(self) -> dict[str, GatedDiff]:
        """The gated differences by name."""
        return {"W": self.W} if self.b is None else {"W": self.W, "b": self.b}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        diff_OI = self.W()
        if self.embedding:
            return self.output_scale * F.embedding(x, diff_OI.mT).to(y.dtype)
        return F.linear(x, diff_OI.to(x.dtype), None if self.b is None else self.b().to(x.dtype))

    def weight_delta(self) -> Tensor:
        return self.W.mean()

    def bias_delta(self) -> Tensor | None:
        return None if self.b is None else self.b.mean()

    def learning_rates(self) -> dict[str, float]:
        """The gates' own, in the code 10,000 times that of the differences."""
        return {n: self.rate for n, _ in self.named_parameters() if n.rpartition(".")[2] in ("gate", "group")}

    def stepped_parameters(self) -> Iterator[nn.Parameter]:
        return (gate for diff in self.diffs().values() for gate in diff.gates())

    def before_step(self, grad_scale: Tensor | float) -> None:
        shift = math.log(-self.W.low / self.W.high)
        for gate in self.stepped_parameters():
            if gate.requires_grad:
                chance = torch.sigmoid(gate.detach() - shift)
                grad = self.penalty * chance * (1 - chance) * grad_scale
                gate.grad = grad if gate.grad is None else gate.grad.add_(grad)

    def stored(self) -> dict[str, Tensor]:
        return {f"{name}.{n}": t for name, diff in self.diffs().items() for n, t in diff.stored().items()}

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        for name, diff in self.diffs().items():
            own = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
            diff.load_stored(own)

    def stored_spec(self) -> dict[str, torch.Size]:
        return {
            f"{name}.{n}": torch.Size((1,) if n == "group" else (-1,))
            for name, diff in self.diffs().items()
            for n in (("indices", "values", "gates") if diff.group is None else ("indices", "values", "gates", "group"))
        }


class DiffPruning(Method):
    r"""Diff pruning: W + z * dW, where gates z that are trained with dW become mostly zero.

    Guo et al. 2021, arXiv:2012.07463. The penalty λ E‖z‖₀ = λ Σ σ(a - log(-low / high)) shuts gates during training;
    afterwards `prune` keeps the entries of largest |z dW| over all sites and fixes the mask, and training may go on
    with it. Stored are indices and values. The biases of the chosen projections are included; the paper covers every
    parameter of the model, here the sites say which. dW starts at zero, so the output is unchanged at the start, bit
    for bit. Outside of training z has no noise, where the code evaluates with the last sample.

    Training needs four values for each weight (dW, its gate, their gradients) besides the optimizer's: more than full
    fine-tuning. What is small is the result.

    Trained parameters: 2 (O I + O), and 2 more for each site where structured.

    Attributes:
        sites: projections and embeddings.
        structured: one more gate for each tensor, that can shut it as a whole (the paper's better form). Its penalty is
            that of one entry, as in the code.
        penalty: λ; 1.25e-7 is the code's for BERT-large.
        gate_init: a at the start.
        gate_lr: the learning rate that gates need, whatever that of dW (the code: 0.1 and 1e-5). inlay's trainer uses
            it; in a loop of your own give `param_groups(adapter, lr)` to the optimizer.
        low, high: the interval that the gates are stretched to.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "diff"
    citation: ClassVar[str] = """
        @inproceedings{guo2021diff,
          title={Parameter-Efficient Transfer Learning with Diff Pruning},
          author={Guo, Demi and Rush, Alexander M. and Kim, Yoon},
          booktitle={ACL},
          eprint={2012.07463},
          year={2021}
        }"""

    sites: str | tuple[str, ...] = "linear"
    structured: bool = True
    penalty: float = Field(default=1.25e-7, ge=0.0)
    gate_init: float = 5.0
    gate_lr: float = Field(default=0.1, gt=0.0)
    low: float = Field(default=-1.5, lt=0.0)
    high: float = Field(default=1.5, gt=1.0)
    layers: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _finite(self) -> DiffPruning:
        if not all(map(math.isfinite, (self.penalty, self.gate_init, self.gate_lr, self.low, self.high))):
            raise ValueError("all settings of the gates must be finite numbers")
        return self

    def select(self, anatomy: Anatomy) -> list[Site]:
        sites = anatomy.select(self.sites, self.layers, kinds=("linear", "embedding"))
        wrong = [s for s in sites if s.kind not in ("linear", "embedding") or s.tap != "output"]
        if wrong:
            raise MethodError(
                f"DiffPruning changes the weights of projections and embeddings; {wrong[0].name!r} at {wrong[0].leave} "
                "is neither. Name projections, for example sites=('attn.q', 'ffn.up')."
            )
        return sites

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Delta:
        return DiffPruningDelta(site, frozen, self)


def prune(adapter: Adapter, fraction: float = 0.005) -> int:
    """Keeps the entries of largest |z d| over all sites together and fixes the mask for good.

    Call it after training; training may go on with the fixed mask (the paper: three more epochs). Entries that are zero
    are never kept, so fewer than the fraction may remain.

    Args:
        adapter: an adapter with a DiffPruning part.
        fraction: of the entries of the chosen weights and biases; the paper keeps 0.005.

    Returns:
        How many entries are kept.

    Raises:
        MethodError: the adapter has no DiffPruning part, or the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise MethodError(f"prune() keeps a fraction between 0 and 1 of the entries, not {fraction}.")
    diffs = _diffs(adapter)
    with torch.no_grad():
        sizes = [diff.mean().abs() for diff in diffs]
        losers = sum(s.numel() for s in sizes) - math.floor(fraction * sum(s.numel() for s in sizes))
        bound = torch.cat([s.flatten().cpu() for s in sizes]).kthvalue(losers).values if losers else torch.zeros(())
        masks = [size > bound.to(size.device) for size in sizes]
    for diff, kept in zip(diffs, masks, strict=True):
        diff.fix(kept)
    return sum(int(kept.sum()) for kept in masks)


def density(adapter: Adapter) -> float:
    """The fraction of entries whose gate is not shut (without noise).

    Raises:
        MethodError: the adapter has no DiffPruning part.
    """
    diffs = _diffs(adapter)
    with torch.no_grad():
        gates = [[diff._z(gate, sample=False) for gate in diff.gates()] for diff in diffs]
        opened = sum(int((math.prod(z, start=torch.ones(())) != 0).sum()) for z in gates)
    return opened / sum(diff.value.numel() for diff in diffs)


def param_groups(adapter: Adapter, lr: float) -> list[dict[str, Any]]:
    """Optimizer groups: gates at their own learning rate and without weight decay, everything else at `lr`."""
    rates = {
        id(piece.get_parameter(name)): rate
        for piece in adapter.pieces.values()
        for name, rate in piece.learning_rates().items()
    }
    groups: dict[float | None, dict[str, Any]] = {}
    for parameter in (p for p in adapter.parameters() if p.requires_grad):
        rate = rates.get(id(parameter))
        fresh: dict[str, Any] = {"params": [], "lr": lr if rate is None else rate}
        groups.setdefault(rate, fresh if rate is None else {**fresh, "weight_decay": 0.0})["params"].append(parameter)
    return list(groups.values())


def _diffs(adapter: Adapter) -> list[GatedDiff]:
    found = [m for piece in adapter.pieces.values() for m in piece.modules() if isinstance(m, GatedDiff)]
    if not found:
        raise MethodError(f"{adapter!r} has no DiffPruning part.")
    return found
