"""One training step of a model without weights: forward, loss and backward pass on the meta device.

What differs between devices, and what a meta tensor cannot do, is put in its place here: attention, dropout, 8-bit
products, autocast. Legend: B rows, T tokens, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay.planning.head_loss import frozen_projection, loss_in_pieces, passing_through
from inlay.planning.timeline import ROWS, Recorder, Timeline
from inlay.train import recompute
from inlay.train.loss import forward

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Conditions:
    """How a step runs, apart from its size.

    Attributes:
        device: whose kernels are meant.
        padded: rows differ in length, so that a mask is needed.
        checkpointing: activations are computed again in the backward pass.
        autocast: the dtype of matrix products where it is not that of their inputs.
        int8: storages of weights kept in 8 bits by bitsandbytes; their inputs are kept for the backward pass.
    """

    device: Device = "cuda"
    padded: bool = False
    checkpointing: bool = False
    autocast: torch.dtype | None = None
    int8: frozenset[int] = field(default_factory=frozenset)


def record(model: nn.Module, task: str, inputs: Mapping[str, Tensor], conditions: Conditions) -> Timeline:
    """The timeline of one step.

    The model is on the meta device, its trained parameters are those that require gradients; mode and gradients are
    left as they were.

    Args:
        model: with or without an adapter.
        task: one of `inlay.config.Task`.
        inputs: `ROWS` rows on the meta device, of `make_inputs` or `inputs_like`.
        conditions: device, checkpointing, autocast.
    """
    leaf = frozen_projection(model, task, conditions.autocast)
    found = None if leaf is None else _recorded(model, task, inputs, conditions, leaf)
    found = found or _recorded(model, task, inputs, conditions, None)
    assert found is not None, "a step with its logits can always be recorded"
    return found


def _recorded(
    model: nn.Module, task: str, inputs: Mapping[str, Tensor], conditions: Conditions, leaf: nn.Module | None
) -> Timeline | None:
    """The timeline with the output projection `leaf` left to the loss; None if it is not the model's last step."""
    parameters = list(model.parameters())
    known = [*parameters, *model.buffers(), *inputs.values()]
    training = model.training
    model.train()
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        stack.callback(_forget_gradients, parameters)
        recorder = Recorder(known, all_is=not conditions.padded)
        stand = _Stand(recorder, conditions)
        if conditions.checkpointing:
            stack.enter_context(_checkpointing(model, stand))
        stack.enter_context(_autocast_on_meta(conditions.autocast))
        stack.enter_context(recorder)
        with stand:
            if leaf is None:
                output = forward(model, inputs, task)
                loss = _loss(output, inputs, task)
            else:
                with passing_through(leaf) as seen:
                    output = forward(model, inputs, task)
                if not seen.is_last(output.logits):
                    return None
                seen.inputs.clear()
                loss = loss_in_pieces(output.logits, inputs, leaf, task, conditions.autocast, recorder)
        del output
        recorder.forward_ends()
        loss.backward()
        del loss
        return recorder.timeline(parameters)


def make_inputs(task: str, length: int, target_length: int) -> dict[str, Tensor]:
    """Unpadded rows of ids and their labels, on the meta device."""
    ids_BT = torch.zeros(ROWS, length, dtype=torch.long, device="meta")
    if task == "seq2seq":
        written_BT = torch.zeros(ROWS, target_length, dtype=torch.long, device="meta")
        return {"input_ids": ids_BT, "decoder_input_ids": written_BT, "labels": written_BT}
    if task in ("causal-lm", "token-classification"):
        return {"input_ids": ids_BT, "labels": ids_BT}
    labels_B = torch.zeros(ROWS, dtype=torch.long, device="meta")
    if task == "question-answering":
        return {"input_ids": ids_BT, "start_positions": labels_B, "end_positions": labels_B}
    if task == "regression":
        return {"input_ids": ids_BT, "labels": labels_B.float()}
    return {"input_ids": ids_BT, "labels": labels_B}


def inputs_like(inputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The inputs of a batch on the meta device, with `ROWS` rows instead of its own."""

    def like(tensor: Tensor) -> Tensor:
        shape = (ROWS, *tensor.shape[1:]) if tensor.ndim and tensor.shape[0] == rows else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return {name: like(tensor) for name, tensor in inputs.items()}


def _loss(output: Any, inputs: Mapping[str, Tensor], task: str) -> Tensor:
    """The loss of `inlay.train.loss` with every position a target: which ones count is not known without values."""
    if task == "question-answering":
        start = F.cross_entropy(output.start_logits.float(), inputs["start_positions"])
        return (start + F.cross_entropy(output.end_logits.float(), inputs["end_positions"])) / 2
    logits, labels = output.logits, inputs["labels"]
    if task == "regression":
        error: Tensor = logits.float().squeeze(-1) - labels
        return error.square().mean()
    if task == "causal-lm":
        logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    if logits.ndim == 2:
        return F.cross_entropy(logits.float(), labels)
    places_N = torch.zeros(labels.numel(), dtype=torch.long, device="meta")
    return F.cross_entropy(logits[places_N, places_N].float(), labels.flatten())


def _forget_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextlib.contextmanager
def _checkpointing(model: Any, stand: _Stand) -> Iterator[None]:
    again = {"context_fn": lambda: (contextlib.nullcontext(), stand)}
    cached = getattr(model.config, "use_cache", None)
    recompute.turn_on(model, again)
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = cached
        recompute.turn_off(model)


@contextlib.contextmanager
def _autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Lets code ask whether autocast is on, or turn it off, for meta tensors: torch refuses that device.

    What autocast does to them is in `_Stand`; other devices get torch's own answers.
    """
    enabled, dtype_of, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast

    def is_enabled(device: str | None = None) -> bool:
        return dtype is not None if device == "meta" else enabled(device) if device is not None else enabled()

    def get_dtype(device: str) -> torch.dtype:
        return (dtype or torch.bfloat16) if device == "meta" else dtype_of(device)

    def context(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **kwargs)

    torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast = is_enabled, get_dtype, context  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast = enabled, dtype_of, autocast  # type: ignore[misc]


class _Stand(TorchFunctionMode):
    """Puts a device's own way in the place of functions for which the meta device has none, or another."""

    LOWERED = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm, torch.baddbmm)
    RAISED = (F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, Tensor.softmax)
    """What autocast computes in its own dtype, and what CUDA's autocast computes in fp32."""

    def __init__(self, recorder: Recorder, conditions: Conditions) -> None:
        super().__init__()
        self.recorder, self.conditions = recorder, conditions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = kwargs or {}, self.conditions
        if given.autocast is not None:
            if func in self.LOWERED or func is F.scaled_dot_product_attention:
                args, kwargs = _cast(args, kwargs, given.autocast)
            elif given.device == "cuda" and func in self.RAISED:
                args, kwargs = _cast(args, kwargs, torch.float32)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.dropout and given.device == "cuda":
            return _dropout(*args, **kwargs)
        if func is F.linear and given.int8 and _storage(args[1]) in given.int8:
            return _Int8.apply(*args, *kwargs.values())  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        wants_bias_gradient = attn_mask is not None and attn_mask.requires_grad
        if self.conditions.device == "cpu" and (dropout_p > 0 or wants_bias_gradient):
            # The CPU has no fused kernel for these: scores of [B, H, T, T] are made and kept.
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        return _Fused.apply(query, key, value, attn_mask, self.recorder)  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """The memory of a fused attention: it keeps its inputs, its output and a number for each query, never scores."""

    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, recorder: Recorder) -> Tensor:
        rows, heads, queries, _ = q_BHTD.shape
        out = q_BHTD.new_empty(rows, queries, heads, v.shape[-1]).transpose(1, 2)
        norms_BHT = q_BHTD.new_empty(rows, heads, queries, dtype=torch.float32)
        ctx.save_for_backward(q_BHTD, k, v, mask, out, norms_BHT)
        ctx.recorder = recorder
        recorder.add_flops(2 * q_BHTD.numel() * k.shape[2] + 2 * out.numel() * k.shape[2])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTD, k, v, mask, out, _ = ctx.saved_tensors
        # The scores are computed again: five products where the forward pass has two.
        ctx.recorder.add_flops((6 * q_BHTD.numel() + 4 * out.numel()) * k.shape[2])
        wants_bias_gradient = mask is not None and ctx.needs_input_grad[3]
        dmask = torch.empty_like(mask) if wants_bias_gradient else None
        return torch.empty_like(q_BHTD), torch.empty_like(k), torch.empty_like(v), dmask, None


class _Int8(torch.autograd.Function):
    """The memory of LLM.int8 (arXiv:2208.07339) as bitsandbytes has it: the input is kept, although W is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.x, ctx.weight = x, weight_OI
        quantised = x.to(torch.int8)
        del quantised
        return F.linear(x, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dense = torch.empty_like(ctx.weight)
        dx = dy @ dense if ctx.needs_input_grad[0] else None
        return dx, None, *([None] * (len(ctx.needs_input_grad) - 2))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's dropout keeps a mask of one byte an element; elsewhere it is as wide as the input."""
    if not training or p == 0:
        return input
    out, _ = torch.native_dropout(input, p, True)
    return out


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _cast(args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}
