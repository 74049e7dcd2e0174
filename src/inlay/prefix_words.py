"""Starts a prefix from the keys and values that real words have in the frozen model.

A method never sees a model, so this is a function of its own: it runs the model once and sets what the method built.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import MethodError
from inlay.hosts.attend import Recording
from inlay.hosts.keys import KeysHost
from inlay.methods.prefix import PrefixKV
from inlay.state import use

if TYPE_CHECKING:
    from inlay.adapter import Adapter


def init_prefix_from_words(
    adapter: Adapter, token_ids: Sequence[int] | Tensor, *, steps: int = 500, learning_rate: float = 1e-4
) -> float:
    """Sets a prefix to the activations of words, which helps where data are few (Li & Liang 2021, section 7.4).

    The frozen model reads the words alone, at positions 0 to P - 1, in encoder and decoder where it has both. A prefix
    without MLP is set to their keys and values exactly; with an MLP all of it is fitted to them by Adam on the mean
    squared error, as in the reference code.

    Args:
        adapter: an adapter with a prefix (`Prefix`, `PTuningV2`, a mix with one of them).
        token_ids: the words as token ids. Fewer than P are repeated, of more the first P are taken.
        steps: Adam steps for a prefix with an MLP.
        learning_rate: of these steps.

    Returns:
        The error that remains, as a share of the activations' root mean square: 0 without an MLP.

    Raises:
        MethodError: the adapter has no prefix, or there are no words.
    """
    placed = [
        (site.leave, part)
        for site, piece in zip(adapter.sites, adapter.pieces.values(), strict=True)
        for part in piece.modules()
        if isinstance(part, PrefixKV)
    ]
    if not placed:
        raise MethodError(f"adapter {adapter.name!r} has no prefix to start from words: {adapter.method!r}.")
    words = [int(i) for i in token_ids]
    if not words:
        raise MethodError("init_prefix_from_words() got no token ids; tokenize a few words of the task.")
    seen: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for length in {part.length for _, part in placed}:
        seen[length] = _activations(adapter, list(itertools.islice(itertools.cycle(words), length)))
    targets = [(part, *seen[part.length][path]) for path, part in placed]
    with torch.no_grad():
        for part, k, v in targets:
            if part.direct:
                part.P_k.copy_(k)
                part.P_v.copy_(v)
    fitted = [target for target in targets if not target[0].direct]
    return _fit(fitted, steps, learning_rate) if fitted else 0.0


def _activations(adapter: Adapter, words: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values of the words, [P, H D], at every attention that the adapter stands at."""
    model = adapter.model
    hosts = {p: m for p, m in model.named_modules() if isinstance(m, KeysHost) and p in adapter.paths}
    # The model without its head: heads may ask for more than a few words (an end token, labels).
    body = getattr(model, "base_model", model)
    ids = torch.tensor([words], device=next(model.parameters()).device)
    inputs = {"input_ids": ids}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    records = {path: Recording() for path in hosts}
    with torch.no_grad(), _evaluating(model), use(model, None):
        for path, host in hosts.items():
            host._inlay.plan = records[path]
        body(**inputs)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, record in records.items():
        if record.key is None or record.value is None:
            raise MethodError(f"{path} computed no keys when the model read the words, so it cannot start from them.")
        found[path] = _rows(record.key), _rows(record.value)
    return found


def _rows(heads: Tensor) -> Tensor:
    return heads[0].transpose(0, 1).reshape(heads.shape[2], -1).float()


def _fit(targets: list[tuple[PrefixKV, Tensor, Tensor]], steps: int, learning_rate: float) -> float:
    parameters = {id(p): p for part, _, _ in targets for p in part.every_parameter() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate)
    count = sum(k.numel() + v.numel() for _, k, v in targets)

    def error() -> Tensor:
        total = torch.zeros((), device=targets[0][1].device)
        for part, k, v in targets:
            own_k, own_v = part.prefix()
            squares = F.mse_loss(own_k, k, reduction="sum") + F.mse_loss(own_v, v, reduction="sum")
            total = total + squares.to(total.device)
        return total / count

    with torch.enable_grad():
        for _ in range(steps):
            loss = error()
            for parameter, gradient in zip(
                parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
    with torch.no_grad():
        size = sum(k.square().sum().item() + v.square().sum().item() for _, k, v in targets) / count
        return float((error().item() / size) ** 0.5)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
