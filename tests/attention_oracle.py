"""Attention with extra keys, values and head deltas written out without the library, to hold hosts and methods against.

    plain = without_adapters(model)
    logits = run(plain, {path: Extras(k, v)}, inputs)

It follows He et al. 2022, eq. 7: (1 - λ) Attn(q, K, V) + λ Attn(q, P_k, P_v), λ being the share of the prefix. The mask
is the float mask of transformers' eager attention, so nothing rests on what SDPA derives by itself.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface

import inlay
from tiny import batch

NAME = "eager"
"""The oracle takes the place of eager attention, so that modules which compare the name go their usual way."""


@dataclass
class Extras:
    """What one attention gets: k_BHPD and v_BHPD, a gate g_BT1 on them, and a function of the scaled query."""

    k: Tensor | None = None
    v: Tensor | None = None
    gate: Tensor | None = None
    head: object = None


def features(model, **changes):
    """Inputs without labels."""
    inputs = batch(model, **changes)
    labels = inputs.pop("labels")
    if model.config.is_encoder_decoder and labels.ndim == 2:
        inputs["decoder_input_ids"] = labels.clamp_min(0)
    return inputs


def shake(adapter, seed=3, size=0.3):
    """Moves every parameter away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def without_adapters(model):
    """A copy of the base."""
    plain = copy.deepcopy(model)
    inlay.detach(plain)
    return plain


def heads(p, count):
    """P_k or P_v [P, H D] as [1, H, P, D]."""
    return p.view(1, p.shape[0], count, -1).transpose(1, 2)


@contextmanager
def installed(model, extras):
    paths = {id(m): path for path, m in model.named_modules()}

    def attend(module, query, key, value, attention_mask=None, scaling=None, position_bias=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        extra = extras.get(paths[id(module)], Extras())
        groups = query.shape[1] // key.shape[1]

        def scores(k):
            return query @ k.repeat_interleave(groups, 1).mT * scaling

        own = scores(key)
        if position_bias is not None:
            own = own + position_bias
        if attention_mask is not None:
            own = own + attention_mask
        out = own.softmax(-1) @ value.repeat_interleave(groups, 1)
        if extra.k is not None:
            gate = 1.0 if extra.gate is None else extra.gate[:, None]
            prefix = gate * scores(extra.k)
            share = torch.sigmoid(prefix.logsumexp(-1, keepdim=True) - own.logsumexp(-1, keepdim=True))
            value = gate * (prefix.softmax(-1) @ extra.v.repeat_interleave(groups, 1))
            out = (1 - share) * out + share * value
        if extra.head is not None:
            out = out + extra.head(query * scaling)
        return out.transpose(1, 2).contiguous(), None

    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [c._attn_implementation for c in configs]
    AttentionInterface.register(NAME, attend)
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        AttentionInterface._global_mapping.pop(NAME)


def assert_same(model, adapter, got, expected, inputs, tensors):
    """Logits and gradients equal those of the oracle; `tensors` are its copies of the adapter's parameters."""
    exact = got.dtype == torch.float64
    if got.ndim == 3 and not model.config.is_encoder_decoder:
        real = inputs["attention_mask"].bool()  # a padding token may see no key at all, where implementations differ
        got, expected = got[real], expected[real]
    torch.testing.assert_close(got, expected, rtol=1e-6 if exact else 1e-4, atol=1e-6 if exact else 1e-4)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in adapter.named_parameters():
        own, other = parameter.grad, tensors[name].grad
        assert other.any(), name
        assert (own - other).norm() <= (1e-6 if exact else 1e-3) * other.norm(), name


def precise(model, attn):
    """Double precision tells a wrong formula from rounding, where it can be had: several eager functions use fp32."""
    return model.double() if attn == "sdpa" else model


def run(plain, extras, inputs):
    """Logits of the base with extras at the attentions of these paths."""
    with installed(plain, extras):
        return plain(**inputs).logits
