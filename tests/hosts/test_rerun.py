"""Blocks that run again during the backward pass do so with the plans and the padding of their own pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import inlay
from tiny import batch, tiny

DROPPING = {
    "lora": inlay.LoRA(rank=2, dropout=0.4),
    "adalora": inlay.AdaLoRA(init_rank=3, target_rank=2, total_steps=50, dropout=0.4),
    "dora": inlay.DoRA(rank=2, dropout=0.4),
    "bottleneck": inlay.Bottleneck(size=4, dropout=0.4),
    "prefix": inlay.Prefix(length=2, dropout=0.4),
}


def made(method: inlay.Method, family: str, checkpointing: bool) -> tuple[nn.Module, list[inlay.Adapter]]:
    model = tiny(family)
    torch.manual_seed(0)
    pair = [inlay.attach(model, method, name=name, head=None) for name in "ab"]
    for adapter in pair:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, pair


def gradients(run: Callable[[nn.Module], None], method: inlay.Method, family: str, checkpointing: bool) -> list[Tensor]:
    model, pair = made(method, family, checkpointing)
    run(model)
    return [torch.zeros_like(p) if p.grad is None else p.grad for a in pair for p in a.parameters()]


def both(run: Callable[[nn.Module], None], method: inlay.Method, family: str) -> None:
    plain, again = (gradients(run, method, family, flag) for flag in (False, True))
    assert any(g.any() for g in plain)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_another_route_at_the_backward_pass() -> None:
    """LoRAs of one shape: torch's own check of what runs again would see nothing wrong."""

    def run(model: nn.Module) -> None:
        inputs = batch(model)
        with inlay.use(model, "a"):
            loss = model(**inputs).loss
        inlay.use(model, "b")
        loss.backward()
        assert [a for g in model._inlay_state.groups for a in g.names] == ["b"]
        after = model(**inputs).loss
        inlay.use(model, "a")
        inlay.use(model, "b")
        assert torch.equal(model(**inputs).loss, after)

    both(run, inlay.LoRA(rank=2), "llama")


@pytest.mark.parametrize("separately", [False, True])
def test_two_passes_before_one_backward_pass(separately: bool) -> None:
    def run(model: nn.Module) -> None:
        inputs = batch(model)
        losses = []
        for name in "ab":
            with inlay.use(model, name):
                losses.append(model(**inputs).loss)
        if separately:
            for loss in losses:
                loss.backward()
        else:
            (losses[0] + 3 * losses[1]).backward()

    both(run, inlay.LoRA(rank=2), "llama")


def test_the_padding_of_each_pass() -> None:
    """UniPELT's gates average over real tokens: the mask of the later pass must not act on the earlier one."""

    def run(model: nn.Module) -> None:
        inputs = batch(model, rows=2)
        longer, shorter = torch.ones_like(inputs["input_ids"]), torch.ones_like(inputs["input_ids"])
        shorter[:, 2:] = 0
        inlay.use(model, "a")
        losses = [model(**(inputs | {"attention_mask": m})).loss for m in (shorter, longer)]
        with torch.no_grad():
            model(**inputs)
        (losses[0] + 2 * losses[1]).backward()

    both(run, inlay.UniPELT(rank=2, length=2, mid=None), "bert")


def test_a_backward_pass_that_fails_leaves_the_route() -> None:
    model, _ = made(inlay.LoRA(rank=2), "llama", checkpointing=True)
    inputs = batch(model)
    inlay.use(model, "b")
    with torch.no_grad():
        wanted = model(**inputs).logits

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[0].mlp.down_proj.register_full_backward_hook(fail)
    with inlay.use(model, "a"):
        loss = model(**inputs).loss
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, wanted)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_reentrant_checkpointing_drops_the_same_in_both_passes(name: str, rows: bool) -> None:
    """Its first pass runs without gradients, where steps are taken that need not drop anything."""
    found = []
    for checkpointing in (False, True):
        model, pair = made(DROPPING[name], "llama", checkpointing=False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        inlay.use(model, ["a", "b", None] if rows else "a")
        torch.manual_seed(1)
        loss = model(**batch(model)).loss
        loss.backward()
        grads = [p.grad for a in pair for p in a.parameters() if p.grad is not None]
        found.append((loss.detach(), *grads))
    assert len(found[0]) > 1
    torch.testing.assert_close(found[1], found[0])
