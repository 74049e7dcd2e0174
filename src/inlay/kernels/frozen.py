"""The product with a frozen weight and its input gradient, for each way in which such a weight is stored.

What a training step keeps of a frozen layer is the weight itself, which is there anyway: `saved`. A weight in another
dtype than the product (autocast), or packed in 4 bits, is converted into the scratch buffer before each product.

Shapes: M rows, I features entering, O features leaving.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from inlay.kernels import gemm
from inlay.kernels.scratch import scratch

if TYPE_CHECKING:
    from inlay.quant.product import Packed as Stored

Saved = tuple[Tensor | None, ...]


class Storage(Protocol):
    """One way of storing a frozen weight. `layout` is what its tensors do not say; `packed` ones give any dtype."""

    packed: ClassVar[bool]

    def read(self, module: Any) -> tuple[Saved, Any] | None:
        """The tensors and the layout of a leaf; None where they are not what a plain product takes."""

    def forward(self, x_MI: Tensor, saved: Saved, layout: Any, bias_O: Tensor | None) -> Tensor:
        """y = x Wᵀ + b, a fresh tensor with the leading dimensions of x, whatever their number."""

    def input_grad(self, dy_MO: Tensor, saved: Saved, layout: Any) -> Tensor:
        """dx = dy W, a fresh tensor."""


class Dense:
    """`nn.Linear`: W of shape (O, I)."""

    packed: ClassVar[bool] = False

    def read(self, module: Any) -> tuple[Saved, Any] | None:
        weight = weight_of(module)
        return ((weight,), None) if _plain(weight) else None

    def forward(self, x_MI: Tensor, saved: Saved, layout: Any, bias_O: Tensor | None) -> Tensor:
        weight_OI = _like(saved[0], x_MI)
        return gemm.linear(x_MI, weight_OI, bias_O if bias_O is None else bias_O.to(x_MI.dtype))

    def input_grad(self, dy_MO: Tensor, saved: Saved, layout: Any) -> Tensor:
        return gemm.input_grad(dy_MO, _like(saved[0], dy_MO))


class Transposed:
    """transformers' `Conv1D` (GPT-2): W of shape (I, O)."""

    packed: ClassVar[bool] = False

    def read(self, module: Any) -> tuple[Saved, Any] | None:
        weight = weight_of(module)
        return ((weight,), None) if _plain(weight) else None

    def forward(self, x_MI: Tensor, saved: Saved, layout: Any, bias_O: Tensor | None) -> Tensor:
        weight_IO = _like(saved[0], x_MI)
        return gemm.linear(x_MI, weight_IO.t(), bias_O if bias_O is None else bias_O.to(x_MI.dtype))

    def input_grad(self, dy_MO: Tensor, saved: Saved, layout: Any) -> Tensor:
        return gemm.input_grad(dy_MO, _like(saved[0], dy_MO).t())


class Packed:
    """Our `Linear4`: 4 bits and scales."""

    packed: ClassVar[bool] = True

    def read(self, module: Any) -> tuple[Saved, Any] | None:
        packed = module.packed()
        return packed[:4], packed[4:]

    def forward(self, x_MI: Tensor, saved: Saved, layout: Any, bias_O: Tensor | None) -> Tensor:
        return self._stored(saved, layout).linear(x_MI, bias_O)

    def input_grad(self, dy_MO: Tensor, saved: Saved, layout: Any) -> Tensor:
        return self._stored(saved, layout).input_grad(dy_MO)

    @staticmethod
    def _stored(saved: Saved, layout: Any) -> Stored:
        from inlay.quant.product import Packed as Stored

        return Stored._make((*saved, *layout))


def storage_of(base: type[nn.Module]) -> Storage | None:
    """How leaves of exactly this class store their weight; None for classes whose forward may do more."""
    if base is nn.Linear:
        return Dense()
    if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
        return Transposed()
    if base.__module__ == "inlay.quant.linear" and base.__name__ == "Linear4":
        return Packed()
    return None


def weight_of(module: Any) -> Any:
    """`module.weight`, past `Module.__getattr__`, which takes as long as a small product."""
    found = module._parameters.get("weight")
    return module.weight if found is None else found


def bias_of(module: Any) -> Any:
    """`module.bias`, likewise."""
    found = module._parameters.get("bias", module)
    return module.bias if found is module else found


def _plain(weight: Any) -> bool:
    """Neither a tensor class of its own (sharded, quantised) nor trained, nor absent."""
    return type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad and weight.is_floating_point()


def _like(weight: Tensor | None, x: Tensor) -> Tensor:
    assert weight is not None
    if weight.dtype == x.dtype:
        return weight
    return scratch(weight.numel(), x.dtype, weight.device).view(weight.shape).copy_(weight)
