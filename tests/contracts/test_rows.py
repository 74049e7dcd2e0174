"""Every row of a batch with its own adapter: row i of any mixed batch equals that row alone, in value and gradient.

All methods are attached to one model of each family at once, and batches are drawn at random: rows with one adapter,
with none, with two.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import inlay
from inlay.errors import AdapterError, MethodError
from inlay.methods.base import methods
from tiny import batch, tiny

FAMILIES = {"llama": "causal", "gpt2": "causal", "bert": "cls", "bart": "seq2seq", "t5": "seq2seq"}
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_rank": 3, "target_rank": 1, "total_steps": 20},
    "bottleneck": {"size": 6},
    "diffpruning": {"sites": ("attn.q", "ffn.down")},
    "mam": {"length": 2, "mid": 8, "size": 6},
    "multihead": {"length": 3},
    "prefix": {"length": 4},
    "prompt": {"length": 5},
    "ptuning": {"template": "{prompt:2} {text} {prompt:1}", "encoder": "mlp"},
    "ptuningv2": {"length": 3},
    "unipelt": {"rank": 2, "length": 3, "mid": 8, "reduction": 8},
}
# Weights that serve all rows at once: the position bias of T5, which Full would train for its own rows.
UNMIXED = {("full", "t5")}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def furnished(family: str) -> tuple[Any, tuple[str, ...]]:
    """One model with an adapter of each method that the family takes, each with random values."""
    model = tiny(family, FAMILIES[family])
    names = []
    for i, (name, method) in enumerate(methods().items()):
        if (name, family) in UNMIXED or name == "headonly":
            continue
        torch.manual_seed(i)
        try:
            adapter = inlay.attach(model, method(**SETTINGS.get(name, {})), name=name)
        except MethodError:
            assert name == "bitfit"  # no biases in Llama and T5
            continue
        generator = torch.Generator().manual_seed(100 + i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        names.append(name)
    return model, tuple(names)


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: value[i : i + 1] for key, value in inputs.items()}


def inputs_of(model: Any, rows: int, padding: str) -> dict[str, Tensor]:
    inputs = batch(model, rows=rows, length=7, labels=False, padding=padding)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    return inputs


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits with padded positions, whose values mean nothing, put to zero."""
    logits: Tensor = model(**inputs).logits
    if logits.ndim == 3 and not model.config.is_encoder_decoder:
        logits = logits * inputs["attention_mask"].unsqueeze(-1)
    return logits


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if ".inlay." in n]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_row_of_a_mixed_batch_is_that_row_alone(family: str, data: st.DataObject) -> None:
    model, names = furnished(family)
    one = st.sampled_from(names)
    entry = st.one_of(st.none(), one, one, st.lists(one, min_size=2, max_size=2, unique=True).map(tuple))
    entries = data.draw(st.lists(entry, min_size=2, max_size=6))
    assume(all(fits(model, entry) for entry in entries))
    inputs = inputs_of(model, len(entries), data.draw(st.sampled_from(["left", "right"])))
    weights = torch.randn(forward_shape(model, inputs), generator=torch.Generator().manual_seed(5))

    alone, expected = [], {}
    for i, names_of_row in enumerate(entries):
        with inlay.use(model, names_of_row):
            logits = forward(model, row(inputs, i))
        alone.append(logits.detach()[0])
        for name, gradient in gradients(model, (logits[0] * weights[i]).sum()).items() if logits.requires_grad else ():
            expected[name] = expected.get(name, 0) + gradient

    with inlay.use(model, entries):
        mixed = forward(model, inputs)
    for i in range(len(entries)):
        torch.testing.assert_close(mixed[i], alone[i], **TOLERANCE, msg=lambda m, i=i: f"row {i} of {entries}: {m}")
    if not mixed.requires_grad:
        assert not expected
        return
    found = gradients(model, (mixed * weights).sum())
    for name in expected.keys() | found.keys():
        # A parameter that no row uses may be told so by zeros.
        ours, wanted = (g.get(name, torch.zeros(())) for g in (found, expected))
        scale = float(wanted.abs().max().clamp_min(1.0))
        torch.testing.assert_close(
            ours / scale,
            wanted / scale + torch.zeros_like(ours),
            rtol=1e-4,
            atol=5e-5,
            msg=lambda m, n=name: f"{n}, {entries}: {m}",
        )


def fits(model: Any, entry: Any) -> bool:
    """Whether these adapters can act on the same rows: two that replace the same module cannot."""
    try:
        with inlay.use(model, entry):
            return True
    except AdapterError as error:
        if not isinstance(entry, tuple) or not re.search("only one can|rescale", str(error)):
            raise
        return False


def forward_shape(model: Any, inputs: dict[str, Tensor]) -> tuple[int, ...]:
    with torch.no_grad(), inlay.use(model, None):
        return tuple(forward(model, inputs).shape)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_row_is_generated_as_if_it_were_alone(family: str, beams: int, data: st.DataObject) -> None:
    model, names = furnished(family)
    one = st.sampled_from((None, *names))
    entries = data.draw(st.lists(one, min_size=3, max_size=5))
    inputs = batch(model, rows=len(entries), length=6, labels=False, padding="left")
    config = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with inlay.use(model, entries):
        together = model.generate(**inputs, **config)
    for i, name in enumerate(entries):
        with inlay.use(model, name):
            alone = model.generate(**row(inputs, i), **config)[0]
        assert torch.equal(together[i, : len(alone)], alone), f"row {i} of {entries}"
        assert (together[i, len(alone) :] == 0).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["lora", "nobody", None], r"nobody.*\(row 1\)"),
        ([None, None, ("lora", "nobody")], r"nobody.*\(row 2\)"),
        ([None, 3, None], "row 1"),
        ([None, ("lora", "lora"), None], "row 1.*lora"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_by_its_row(rows: list[Any], message: str) -> None:
    model, _ = furnished("llama")
    with pytest.raises(AdapterError, match=message):
        inlay.use(model, rows)


def test_a_list_of_the_wrong_length_says_both_lengths() -> None:
    model, _ = furnished("llama")
    with inlay.use(model, ["lora", None]), pytest.raises(AdapterError, match=r"2 .*3|3 .*2"):
        model(**inputs_of(model, 3, "right"))


def test_many_adapters_trained_in_one_pass_are_those_trained_one_after_another() -> None:
    def run(together: bool) -> list[Tensor]:
        model = tiny("llama")
        for i in range(8):
            torch.manual_seed(i)
            inlay.attach(model, inlay.LoRA(rank=2 + i % 3, sites="linear"), name=f"a{i}")
        trained = [p for n, p in model.named_parameters() if ".inlay." in n]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        ids = torch.randint(3, 90, (8, 6), generator=torch.Generator().manual_seed(0))
        names = [f"a{i}" for i in range(8)]
        for _ in range(5):
            optimizer.zero_grad()
            for group in [list(range(8))] if together else [[i] for i in range(8)]:
                with inlay.use(model, [names[i] for i in group]):
                    logits = model(input_ids=ids[group]).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), ids[group, 1:].flatten(), reduction="sum"
                )
                loss.backward()
            optimizer.step()
        return [p.detach() for p in trained]

    for ours, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
