"""Telling one base model from another: the shapes of its modules and a few of its values.

The shapes are compared exactly, whatever the storage. The values are compared exactly where both sides hold them in
the same dtype, and within rounding where they do not (a model loaded in bf16 is the same base). Quantised weights are
compared by shape alone; norms, biases and embeddings still tell bases apart there. Task heads do not count: they are
new for each task and travel with the adapter.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from typing import Any

import torch
from torch import Tensor, nn

from inlay.anatomy.assemble import head_of
from inlay.anatomy.probe import modules_of, static_leaves
from inlay.quant.bridge import is_quantized
from inlay.sharded import size_of, whole

TENSORS = 24
VALUES = 8
ROUNDING = 2e-2


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a base model, as JSON-compatible values."""
    leaves = static_leaves(model)
    head = set(head_of(model, leaves)[0])
    shapes = [[p, leaf.in_features, leaf.out_features] for p, leaf in sorted(leaves.items()) if p not in head]
    samples: dict[str, dict[str, str]] = {}
    candidates = [
        (f"{path}.{name}", parameter)
        for path, module in modules_of(model)
        if path in leaves and path not in head
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and size_of(parameter) and not parameter.is_meta
        # torchao's storage calls itself floating point, but it decodes to rounded values.
        if not (name == "weight" and is_quantized(module))
    ]
    # Biases and norms are kept as they are in a quantised base, so they come first: every variant shares them.
    candidates.sort(key=lambda c: (c[1].ndim > 1, c[0]))
    for name, parameter in _spread(candidates):
        samples[name] = {"dtype": str(parameter.dtype).removeprefix("torch."), "values": _encode(_sample(parameter))}
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    return {"shapes": digest, "samples": samples}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What speaks against two fingerprints belonging to the same base, in words; empty if nothing does."""
    problems = []
    if expected["shapes"] != found["shapes"]:
        problems.append("its modules have other names or shapes")
    for name, old in expected["samples"].items():
        new = found["samples"].get(name)
        if new is None:
            continue
        a, b = _decode(old["values"]), _decode(new["values"])
        same = a.equal(b) if old["dtype"] == new["dtype"] else a.shape == b.shape and _close(a, b)
        if not same:
            problems.append(f"{name} holds other values")
    return problems


def _spread(candidates: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    if len(candidates) <= TENSORS:
        return candidates
    step = len(candidates) / TENSORS
    return [candidates[int(i * step)] for i in range(TENSORS)]


def _sample(parameter: Tensor) -> Tensor:
    flat = whole(parameter).detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(VALUES, flat.numel())).long().to(flat.device)
    return flat[index].float().cpu()


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= ROUNDING * a.abs().clamp_min(1e-3)).all())


def _encode(values: Tensor) -> str:
    return base64.b64encode(struct.pack(f"<{values.numel()}f", *values.tolist())).decode()


def _decode(text: str) -> Tensor:
    raw = base64.b64decode(text, validate=True)
    return torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))
