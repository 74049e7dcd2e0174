"""A dense oracle: the base model with W + ΔW written out, against which an adapter's logits and gradients are held.

from methods.oracle import assert_equals_dense

def lora(t, W_OI, b_O):                     # t: the adapter's tensors at this site, leaves of the graph
    return W_OI + 2.0 * t["B"] @ t["A"], b_O

assert_equals_dense(model, adapter, lora)
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import inlay
from inlay.anatomy.base import Site
from tiny import batch

Formula = Callable[[dict[str, Tensor], Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def randomise(adapter: inlay.Adapter, std: float = 0.2, seed: int = 7) -> None:
    """Moves every parameter away from where it started; initial values prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def without_adapters(model: nn.Module) -> nn.Module:
    """A copy of the base as it was before any adapter."""
    plain = copy.deepcopy(model)
    inlay.detach(plain)
    return plain


def transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as (in, out)."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def run(model: nn.Module, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The logits of a small batch, and the input embeddings that they were computed from, as a leaf of the graph."""
    inputs = {k: v for k, v in batch(model, rows=2, length=7).items() if k != "labels"}
    ids = inputs.pop("input_ids")
    embedding = (weights or {}).get("embedding", model.get_input_embeddings().weight)
    inputs["inputs_embeds"] = embedding.detach()[ids].requires_grad_()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    logits = functional_call(model, weights or {}, kwargs=inputs, tie_weights=False).logits
    return logits, inputs["inputs_embeds"]


def dense_weights(
    plain: nn.Module, adapter: inlay.Adapter, formula: Formula
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that `formula` gives for every site, and the adapter's tensors as leaves of the graph."""
    modules = dict(plain.named_modules())
    leaves = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}
    weights: dict[str, Tensor] = {}
    for key, site in zip(adapter.pieces, adapter.sites, strict=True):
        own = {n.removeprefix(key + "."): t for n, t in leaves.items() if n.startswith(key + ".")}
        module = modules[site.leave]
        weight = weights.get(f"{site.leave}.weight", module.weight.detach())
        bias = weights.get(f"{site.leave}.bias", None if module.bias is None else module.bias.detach()) if hasattr(
            module, "bias"
        ) else None  # fmt: skip
        weight_OI = weight.t() if transposed(module) else weight
        weight_OI, bias = _placed(formula, own, weight_OI, bias, site)
        weights[f"{site.leave}.weight"] = weight_OI.t() if transposed(module) else weight_OI
        if bias is not None:
            weights[f"{site.leave}.bias"] = bias
    return weights, leaves


def _placed(
    formula: Formula, own: dict[str, Tensor], weight_OI: Tensor, bias: Tensor | None, site: Site
) -> tuple[Tensor, Tensor | None]:
    if site.columns is None:
        return formula(own, weight_OI, bias)
    index = torch.cat([torch.arange(lo, hi) for lo, hi in site.columns])
    part, shift = formula(own, weight_OI[index], None if bias is None else bias[index])
    bias = bias if shift is None or bias is None else bias.index_copy(0, index, shift)
    return weight_OI.index_copy(0, index, part), bias


def assert_equals_dense(
    model: nn.Module, adapter: inlay.Adapter, formula: Formula, rtol: float = 1e-4, atol: float = 2e-5
) -> None:
    """Logits, gradients of every adapter parameter, and the gradient of the input equal those of the dense weights."""
    plain = without_adapters(model)
    weights, leaves = dense_weights(plain, adapter, formula)
    wanted, x_wanted = run(plain, weights)
    got, x_got = run(model)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
    base = run(plain)[0]
    assert (wanted - base).abs().max() > 1e-2, "the adapter does nothing, so this would prove nothing"
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    assert_grads(x_got, x_wanted, "x", rtol, atol)
    for name, parameter in adapter.named_parameters():
        assert_grads(parameter, leaves[name], name, rtol, atol)


def assert_grads(got: Tensor, wanted: Tensor, name: str, rtol: float, atol: float) -> None:
    """The gradients of two leaves are equal up to rounding, and not zero."""
    assert wanted.grad is not None, name
    assert wanted.grad.any(), f"no gradient reaches {name}, so this would prove nothing"
    assert got.grad is not None, name
    size = float(wanted.grad.abs().max())
    atol = atol * max(1.0, size)
    torch.testing.assert_close(got.grad, wanted.grad, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")
