"""A frozen projection under DoRA as one step of autograd.

    z = x Wᵀ + s (x̂ Aᵀ) Bᵀ + b        y = z + (m / n - 1) (z - b)

    dz = (m / n) dy        dm = Σ dy (z - b) / n        dx, dA, dB from dz as in `lora`

n is a constant of the backward pass. Kept are x, the rank-R product, z and a seed for the dropout mask.

Shapes: M rows (all leading dimensions), I / O features entering / leaving, R rank.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inlay.kernels import compiled, dropout
from inlay.kernels.frozen import Saved, Storage, storage_of
from inlay.kernels.lora import Term, add_low_rank, cast_once, dtype_of, factor_grads, usable, widened, without_autocast
from inlay.memo import versions

if TYPE_CHECKING:
    from inlay.methods.dora import DoRADelta


class DoRALinear:
    """What a hosted projection gives for x with one DoRA piece, or None: see `LoRALinear`."""

    def __init__(self, delta: DoRADelta, base: type[nn.Module], storage: Storage) -> None:
        self.delta, self.base, self.storage = delta, base, storage
        self._forward: Any = base.forward
        self._kept: tuple[object, tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None

    @classmethod
    def make(cls, delta: DoRADelta, base: type[nn.Module]) -> DoRALinear | None:
        """For leaves of this class, or None."""
        storage = storage_of(base)
        return None if storage is None else cls(delta, base, storage)

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """y of shape (..., O) for x of shape (..., I), or None."""
        if not usable(x):
            return None
        if not torch.is_grad_enabled():
            return self._without_grad(module, x)
        delta, dtype = self.delta, dtype_of(module, x, self.storage)
        found = None if dtype is None else self.storage.read(module)
        bias_O = module.bias
        if dtype is None or found is None or (bias_O is not None and bias_O.requires_grad):
            return None
        shared = x if x.dtype == dtype else cast_once(x, dtype)
        mask = None
        if delta.dropout and delta.training:
            if not dropout.supports(shared):
                return None
            mask = dropout.draw(delta.dropout)
        term = Term(None, delta.scale, mask)
        y: Tensor = _DoRALinear.apply(  # type: ignore[no-untyped-call]
            x, shared, bias_O, self.storage, found, term, delta.norm(), delta.A, delta.B, delta.m
        )
        return y

    def _without_grad(self, module: Any, x: Tensor) -> Tensor | None:
        delta = self.delta
        if delta.dropout and delta.training:
            return None
        y: Tensor = self._forward(module, x)
        if type(y) is not Tensor or not y.is_contiguous():
            return None
        A_IR, B_RO, gain_O, shift_O = self._values(y.dtype)
        x_MI, y_MO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if x_MI.dtype != y.dtype:
            x_MI = x_MI.to(y.dtype)
        y_MO.addmm_(x_MI.mm(A_IR), B_RO, alpha=delta.scale)
        y_MO.addcmul_(y_MO, gain_O)
        if shift_O is not None:
            y_MO.sub_(shift_O)
        return y

    def _values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Aᵀ, Bᵀ, m / n - 1 and (m / n - 1) b in this dtype, kept until something that they are made of changes."""
        delta = self.delta
        bias_O = delta.frozen.bias
        key = dtype, delta.frozen.version, versions(delta.A, delta.B, delta.m, *([] if bias_O is None else [bias_O]))
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                gain_O = delta.m.detach() / delta.norm() - 1
                shift_O = None if bias_O is None else (gain_O * bias_O.detach()).to(dtype)
                factors = delta.A.detach().to(dtype).t(), delta.B.detach().to(dtype).t()
                self._kept = key, (*factors, gain_O.to(dtype), shift_O)
        return self._kept[1]

    def __reduce__(self) -> Any:
        return type(self), (self.delta, self.base, self.storage)


class _DoRALinear(torch.autograd.Function):
    """x is the differentiable input, `shared` the same values in the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: Tensor,
        bias_O: Tensor | None,
        storage: Storage,
        found: tuple[Saved, Any],
        term: Term,
        norm_O: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        m_O: Tensor,
    ) -> Tensor:
        saved, layout = found
        with without_autocast(x.device.type):
            x_MI = widened(shared.reshape(-1, shared.shape[-1]))
            z_MO = storage.forward(x_MI, saved, layout, bias_O)
            s_MR = add_low_rank(x_MI, A_RI, B_OR, term, z_MO).to(shared.dtype)
            z_MO = z_MO.to(shared.dtype)
            y_MO = _rescale(z_MO, m_O / norm_O - 1, bias_O)
        ctx.save_for_backward(shared, z_MO, s_MR, A_RI, B_OR, m_O, norm_O, bias_O, *saved)
        ctx.storage, ctx.layout, ctx.term, ctx.dtype = storage, layout, term, x.dtype
        # No view: models may go on in place, which autograd forbids on views made in a Function.
        y: Tensor = torch.ops.aten._unsafe_view(y_MO, [*x.shape[:-1], y_MO.shape[-1]])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        shared, z_MO, s_MR, A_RI, B_OR, m_O, norm_O, bias_O, *saved = ctx.saved_tensors
        with without_autocast(dy.device.type):
            x_MI, dy_MO = shared.reshape(-1, shared.shape[-1]), dy.reshape(-1, dy.shape[-1])
            dz_MO, dratio_O = _rescale_grads(dy_MO, z_MO, m_O / norm_O - 1, bias_O)
            x_MI, dz_MO = widened(x_MI), widened(dz_MO)
            s_MR = s_MR.to(x_MI.dtype)
            dx_MI = ctx.storage.input_grad(dz_MO, tuple(saved), ctx.layout) if ctx.needs_input_grad[0] else None
            dA_RI, dB_OR = factor_grads(dz_MO, x_MI, s_MR, A_RI, B_OR, ctx.term, dx_MI)
            dx = None if dx_MI is None else dx_MI.view(shared.shape).to(ctx.dtype)
        return dx, None, None, None, None, None, None, dA_RI, dB_OR, (dratio_O / norm_O).to(m_O.dtype)


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_THREADED_FROM = 1 << 17


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled.load("dora.c") if compiled.enabled() else None
    if library is None:
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.inlay_dora_forward.argtypes = [*[pointer] * 4, long, long, ctypes.c_int, ctypes.c_int]
    library.inlay_dora_backward.argtypes = [*[pointer] * 6, long, long, ctypes.c_int, ctypes.c_int]
    return library


def _compiled_for(*tensors_MO: Tensor) -> ctypes.CDLL | None:
    fits = all(t.is_cpu and t.dtype in _DTYPES and t.is_contiguous() for t in tensors_MO)
    return _library() if fits else None


def _rescale(z_MO: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """y = z + gain (z - b)."""
    library = _compiled_for(z_MO)
    if library is None:
        y_MO = torch.addcmul(z_MO, z_MO, gain_O.to(z_MO.dtype))
        return y_MO if bias_O is None else y_MO.sub_((gain_O * bias_O).to(y_MO.dtype))
    y_MO, gain_O, shift_O = torch.empty_like(z_MO), gain_O.float().contiguous(), _shift(gain_O, bias_O)
    library.inlay_dora_forward(z_MO.data_ptr(), gain_O.data_ptr(), shift_O.data_ptr(), y_MO.data_ptr(), *_extent(z_MO))
    return y_MO


def _rescale_grads(dy_MO: Tensor, z_MO: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
    """dz = (1 + gain) dy, and Σ dy (z - b) over the rows in fp32."""
    library = _compiled_for(dy_MO, z_MO)
    if library is None:
        wide = torch.promote_types(z_MO.dtype, torch.float32)
        sum_O = (dy_MO * z_MO).sum(0, dtype=wide)
        if bias_O is not None:
            sum_O -= bias_O * dy_MO.sum(0, dtype=wide)
        return torch.addcmul(dy_MO, dy_MO, gain_O.to(dy_MO.dtype)), sum_O
    dz_MO, gain_O, shift_O = torch.empty_like(dy_MO), gain_O.float().contiguous(), _shift(gain_O, bias_O)
    sum_O = torch.empty_like(shift_O)
    library.inlay_dora_backward(*(t.data_ptr() for t in (dy_MO, z_MO, gain_O, shift_O, dz_MO, sum_O)), *_extent(z_MO))
    return dz_MO, sum_O


def _shift(gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.zeros_like(gain_O, dtype=torch.float32) if bias_O is None else bias_O.float().contiguous()


def _extent(z_MO: Tensor) -> tuple[int, int, int, int]:
    threads = torch.get_num_threads() if z_MO.numel() >= _THREADED_FROM else 1
    return z_MO.shape[0], z_MO.shape[1], _DTYPES[z_MO.dtype], threads
