"""Gates: a small learned valve on any piece, the composition that UniPELT adds to the table of methods.

Legend: B batch, T tokens, I features, H heads, P prefix length, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.anatomy.base import Site
from inlay.errors import MergeError, MethodError
from inlay.methods.base import Delta, ExtraKV

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from inlay.adapter import Adapter
    from inlay.padding import Padding

GateForm = Literal["auto", "mean", "per_token", "published"]


class Gate(nn.Module):
    r"""g = σ(w x + b), between 0 and 1 for each example or each token (Mao et al. 2022, arXiv:2110.07577).

    * "published": the mean of σ over all positions of the tensor, padding included; one number for each example. In a
      causal model it lets later tokens act on earlier ones, and decoding with a cache gives other values than one pass.
    * "mean": the same over real tokens only, so padding does not matter. The default in encoders.
    * "per_token": each token has its own number. The default where tokens must not see the future.

    w starts as N(0, 0.02²) and b at zero, so gates start near one half, as in the reference code.
    """

    def __init__(self, site: Site, width: int, form: GateForm) -> None:
        super().__init__()
        if form == "auto":
            form = "per_token" if site.causal or site.stack == "decoder" else "mean"
        self.form, self.causal = form, site.causal
        self.weight = nn.Parameter(torch.empty(1, width, dtype=torch.float32).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """g of shape [B, T, 1] per token, [B, 1, 1] otherwise, in the dtype of x.

        Args:
            x: [B, T, I]; [B*T, I] only per token.
            mask: [B, T], non-zero at real tokens; None where there is no padding.
        """
        g = torch.sigmoid(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))
        if self.form == "per_token":
            return g
        if x.ndim != 3:
            raise MethodError(
                f'a gate of form "{self.form}" averages over the tokens of an example, but here they come without '
                f'their example, as {tuple(x.shape)}. Use gate="per_token".'
            )
        if self.form == "published" or mask is None:
            return g.mean(-2, keepdim=True)
        real = mask[:, -x.shape[1] :, None].to(g.dtype)
        mean: Tensor = (g * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
        return mean

    def mask(self, padding: Padding, x: Tensor) -> Tensor | None:
        """The mask of x, for the one form that leaves padding out."""
        return padding.mask_for(x) if self.form == "mean" else None


class GatedDelta(Delta):
    """g(z) Δ(x, y), where z is what the inner piece itself reads."""

    needs_padding: ClassVar[bool] = True

    def __init__(self, inner: Delta, gate: Gate, reads: str = "x") -> None:
        super().__init__()
        self.inner, self.gate, self.reads = inner, gate, reads

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x if self.reads == "x" else y if self.reads == "y" else x + y
        gated: Tensor = self.gate(z, self.gate.mask(self.padding, z)) * self.inner(x, y)
        return gated

    def weight_delta(self) -> Tensor:
        raise MergeError("a gate depends on the input, so no weight holds what it scales. Keep it attached.")


class GatedKV(ExtraKV):
    """Extra keys and values scaled by a gate: the same g on both, as published."""

    needs_padding: ClassVar[bool] = True

    def __init__(self, inner: ExtraKV, gate: Gate) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        k, v = self.inner(x)[:2]
        g = self.gate(x, self.gate.mask(self.padding, x))
        if self.gate.form == "per_token":
            return k, v, g
        return k * g[:, None].to(k.dtype), v * g[:, None].to(v.dtype)

    def stored(self) -> dict[str, Tensor]:
        return {f"inner.{n}": t for n, t in self.inner.stored().items()} | {
            f"gate.{n}": t for n, t in self.gate.state_dict().items()
        }

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        self.inner.load_stored({n.removeprefix("inner."): t for n, t in tensors.items() if n.startswith("inner.")})
        self.gate.load_state_dict({n.removeprefix("gate."): t for n, t in tensors.items() if n.startswith("gate.")})


@contextlib.contextmanager
def record_gates(adapter: Adapter) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the values of all gates of an adapter while the block runs.

    Yields:
        for each gate, by the path of its module, one tensor [B] for each forward pass: the mean over tokens.
    """
    values: dict[str, list[Tensor]] = {}
    handles = []
    for key, piece in adapter.pieces.items():
        for name, module in piece.named_modules():
            if isinstance(module, Gate):
                seen = values.setdefault(f"{key}.{name}", [])

                def keep(_: nn.Module, __: tuple[object, ...], g: Tensor, seen: list[Tensor] = seen) -> None:
                    seen.append(g.detach().float().reshape(g.shape[0], -1).mean(-1).cpu())

                handles.append(module.register_forward_hook(keep))
    if not handles:
        raise MethodError(f"adapter {adapter.name!r} has no gates to record; UniPELT has.")
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def plot_gates(values: dict[str, list[Tensor]]) -> Figure:
    """A picture of recorded gates: one row for each gate, one column for each forward pass."""
    from matplotlib.figure import Figure

    names = list(values)
    table = torch.stack([torch.stack([v.mean() for v in values[n]]) for n in names])
    figure = Figure(figsize=(8, 0.28 * len(names) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(names)), labels=names, fontsize=6)
    axes.set_xlabel("forward pass")
    figure.colorbar(image, ax=axes, label="gate (0 closed, 1 open)")
    return figure
