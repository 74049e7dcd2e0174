"""Every formulation of many adapters in one batch against the plain loop over rows, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inlay
from inlay.anatomy.base import Site
from inlay.kernels import lora_rows
from inlay.kernels.lora_rows import LoRARows
from inlay.methods.lora import LoRADelta


def pieces(ranks, width=12, out=10):
    torch.manual_seed(len(ranks))
    made = [LoRADelta(Site("p", "p", "p", width, out), r, 0.5 + i, 0.0, "kaiming") for i, r in enumerate(ranks)]
    for piece in made:
        torch.nn.init.normal_(piece.B)
    return made


def loop(deltas, index, x, y):
    k = x.shape[0] // len(index)
    rows = [
        mine if j < 0 else mine + deltas[j](x[i * k : (i + 1) * k], mine)
        for i, j in enumerate(index)
        for mine in [y[i * k : (i + 1) * k]]
    ]
    return torch.cat(rows)


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rows=st.integers(1, 6),
    beams=st.integers(1, 3),
    tokens=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 99),
)
def test_each_formulation_equals_the_loop_in_value_and_gradient(ranks, rows, beams, tokens, seed):
    deltas = pieces(ranks)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, len(ranks), (rows,), generator=generator).tolist()
    shape = (rows * beams,) if tokens is None else (rows * beams, tokens)
    x = torch.randn(*shape, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(*shape, 10, generator=generator, dtype=torch.float64)
    want = loop(deltas, index, x, y)
    if max(index) < 0:
        index[0] = 0
        want = loop(deltas, index, x, y)
    kernel = LoRARows(deltas, index)
    forms = {"auto": lambda: kernel(x, y)}
    if beams == 1 and tokens in (None, 1):
        flat = x.reshape(rows, 12), y.reshape(rows, 10)
        forms["wide"] = lambda: kernel._wide(*flat, kernel.used, kernel.foreign).reshape(y.shape)
        forms["wide over all"] = lambda: kernel._wide(*flat, kernel.all, kernel.all_foreign).reshape(y.shape)
        forms["grouped"] = lambda: kernel._grouped(*flat).reshape(y.shape)
    rows_x, rows_y = x.reshape(rows, -1, 12), y.reshape(rows, -1, 10)
    forms["over all"] = lambda: kernel._batched(rows_x, rows_y, kernel.all, kernel.all_gather).reshape(y.shape)
    parameters = [p for d in deltas for p in d.parameters()]
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    wanted = gradients(want, weight, parameters)
    for name, form in forms.items():
        got = form()
        torch.testing.assert_close(got, want, msg=name)
        for a, b in zip(gradients(got, weight, parameters), wanted, strict=True):
            torch.testing.assert_close(a, b, msg=name)
        with torch.no_grad():
            torch.testing.assert_close(form(), want.detach(), msg=name)


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rows=st.integers(1, 7),
    tokens=st.sampled_from([1, 2, 5]),
    width=st.sampled_from([3, 16, 37]),
    fresh=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_compiled_form_equals_the_loop(ranks, rows, tokens, width, fresh, seed):
    if lora_rows._library() is None:
        pytest.skip("no C compiler")
    deltas = pieces(ranks, width, width + 4)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, len(ranks), (rows,), generator=generator).tolist()
    index[0] = 0
    x = torch.randn(rows, tokens, width, generator=generator)
    y = torch.randn(rows, tokens, width + 4, generator=generator)
    kernel = LoRARows(deltas, index)
    kernel.fresh = fresh
    with torch.no_grad():
        want, before = loop(deltas, index, x, y), y.clone()
        got = kernel._compiled(x, y)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got is y if fresh else torch.equal(y, before)
    untouched = [i for i, k in enumerate(index) if k < 0]
    assert torch.equal(got[untouched], before[untouched])


def test_the_compiled_form_leaves_to_others_what_it_cannot_do():
    deltas = pieces([2, 2])
    kernel = LoRARows(deltas, [0, 1])
    x, y = torch.randn(2, 1, 12), torch.zeros(2, 1, 10)
    assert kernel._compiled(x, y) is None, "gradients"
    with torch.no_grad():
        assert kernel._compiled(x.double(), y.double()) is None
        assert kernel._compiled(x, torch.zeros(2, 1, 20)[..., ::2]) is None
        wide = LoRARows(pieces([lora_rows.SKINNY + 1]), [0, 0])
        assert wide._compiled(torch.randn(2, 3, 12), torch.zeros(2, 3, 10)) is None
        assert torch.func.vmap(lambda a, b: kernel(a, b))(x[None], y[None]).shape == (1, 2, 1, 10)


def gradients(out, weight, parameters):
    """Zeros where a parameter took no part."""
    if not out.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def test_a_spoilt_adapter_spoils_its_own_rows_only():
    deltas = pieces([2, 2])
    with torch.no_grad():
        deltas[1].A.fill_(float("nan"))
    for tokens in (1, 4):
        x, y = torch.randn(3, tokens, 12), torch.randn(3, tokens, 10)
        with torch.no_grad():
            out = LoRARows(deltas, [0, 1, -1])(x, y)
        assert out[[0, 2]].isfinite().all()
        assert out[1].isnan().all()


def test_another_composition_is_the_same_program():
    """Compiled once for a batch of four rows: any adapters on any rows, one adapter on all of them included."""
    from torch._dynamo.testing import CompileCounter

    from tiny import tiny

    model = tiny("llama")
    for i in range(3):
        adapter = inlay.attach(model, inlay.LoRA(rank=2, sites=("attn.q", "ffn.up")), name=f"a{i}")
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(0))
    compositions = [["a0", "a1", None, "a2"], ["a2", "a2", "a0", "a1"], ["a1"] * 4, [None, None, "a0", None]]
    with torch.no_grad():
        for rows in compositions:
            with inlay.use(model, rows):
                got, want = compiled(input_ids=ids).logits, model(input_ids=ids).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_kept_factors_follow_a_changed_piece():
    deltas = pieces([2, 2])
    kernel = LoRARows(deltas, [0, 1])
    x, y = torch.randn(2, 1, 12), torch.zeros(2, 1, 10)
    with torch.no_grad():
        first = kernel(x, y)
        deltas[0].B.mul_(2)
        second = kernel(x, y)
    torch.testing.assert_close(second[0], 2 * first[0])
    torch.testing.assert_close(second[1], first[1])


def test_kept_factors_follow_the_steps_of_a_fused_optimizer():
    """Fused AdamW writes parameters without raising their version counters."""
    deltas = pieces([2, 2])
    kernel = LoRARows(deltas, [0, 1])
    x, y = torch.randn(2, 1, 12), torch.zeros(2, 1, 10)
    optimizer = torch.optim.AdamW([p for d in deltas for p in d.parameters()], lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(kernel(x, y), loop(deltas, [0, 1], x, y))
        before = [d.B._version for d in deltas]
        kernel(x, y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [d.B._version for d in deltas] == before, "or this test shows nothing"
    with torch.no_grad():
        torch.testing.assert_close(kernel(x, y), loop(deltas, [0, 1], x, y))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_host_takes_it_and_rows_equal_themselves_alone(family):
    from tiny import batch, tiny

    model = tiny(family, dtype=torch.float64)
    for i, rank in enumerate((2, 3, 2)):
        adapter = inlay.attach(model, inlay.LoRA(rank=rank, sites=("attn.q", "attn.v", "ffn.up")), name=f"a{i}")
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    rows = ["a1", None, "a0", "a1", "a2"]
    inputs = {k: v for k, v in batch(model, rows=5).items() if k != "labels"}
    with torch.no_grad(), inlay.use(model, rows):
        plans = [m._inlay.plan for m in model.modules() if hasattr(m, "_inlay")]
        assert plans
        assert all(p.together for p in plans)
        mixed = model(**inputs).logits
    for i, name in enumerate(rows):
        with torch.no_grad(), inlay.use(model, name):
            torch.testing.assert_close(mixed[i], model(**inputs).logits[i])
