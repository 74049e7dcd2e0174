"""The architecture from tomorrow and the plain module of docs/architectures.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import inlay
from attention_oracle import shake

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


@pytest.fixture
def page():
    """The names that the page's code defines after all of it ran."""
    names: dict[str, object] = {"__name__": "architectures_page"}
    text = PAGE.read_text(encoding="utf-8")
    text = text[text.index("## An architecture that nobody knows") :]
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_the_architecture_from_tomorrow_is_understood_and_takes_every_kind_of_piece(page):
    model, adapter = page["model"], page["adapter"]
    found = inlay.anatomy(model)
    attention, ffn = found.blocks[1].attentions[0], found.blocks[1].ffns[0]
    assert (attention.form, attention.heads.query, attention.heads.kv, attention.heads.causal) == (
        "softmax",
        4,
        1,
        True,
    )
    assert (attention.q[0].leaf, attention.o) == ("layers.1.ask", "layers.1.tell")
    assert (ffn.up, ffn.down) == ("layers.1.grow", "layers.1.shrink")
    shake(adapter)
    ids = torch.arange(8).view(2, 4)
    weight = torch.randn(2, 4, 100, generator=torch.Generator().manual_seed(0))
    (model(ids) * weight).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    with torch.no_grad(), inlay.use(model, ["default", None]):
        mixed = model(ids)
    for row, name in enumerate(("default", None)):
        with torch.no_grad(), inlay.use(model, name):
            torch.testing.assert_close(mixed[row], model(ids)[row], rtol=1e-5, atol=1e-5)


def test_its_prefix_keeps_the_cap_and_the_causal_mask_of_its_scores(page):
    model = page["model"]
    inlay.detach(model)
    adapter = inlay.attach(model, inlay.Prefix(length=3))
    shake(adapter, size=3.0)
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        whole, start = model(ids), model(ids[:, :2])
    torch.testing.assert_close(whole[:, :2], start)
    layer, piece = model.layers[0], adapter.pieces["layers.0.prefix"]
    with torch.no_grad():
        h = model.words(ids)
        x = layer.calm(h)
        q = layer.ask(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = layer.know(x).unsqueeze(1).chunk(2, -1)
        p_k, p_v = (getattr(piece, n).view(1, 1, 3, 8) for n in ("P_k", "P_v"))
        scores = torch.cat([(q @ p.mT / 8**0.5 / 20).tanh() * 20 for p in (p_k, k)], -1)
        scores = scores.masked_fill(_later(), -1e9)
        out = scores.softmax(-1) @ torch.cat([p_v.expand(2, -1, -1, -1), v], 2)
        expected = h + layer.tell(out.transpose(1, 2).flatten(2)) + layer.shrink(torch.relu(layer.grow(x)))
        torch.testing.assert_close(layer(h), expected, rtol=1e-5, atol=1e-5)


def _later():
    """[queries, extra keys and keys]: what a query may not see."""
    return torch.cat([torch.zeros(4, 3, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool).triu(1)], -1)


def test_the_plain_module_is_adapted_by_role_and_by_path(page):
    plain, by_role, by_path = page["plain"], page["by_role"], page["by_path"]
    assert [(s.leave, s.columns) for s in by_role.sites] == [
        ("1.look", None), ("1.content", ((24, 48),)), ("2.look", None), ("2.content", ((24, 48),)),
    ]  # fmt: skip
    assert {s.leave for s in by_path.sites} == {"1.look", "1.wide", "2.look", "2.wide"}
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = plain(ids)
        inlay.detach(plain)
        assert torch.equal(plain(ids), before)
