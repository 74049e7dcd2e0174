"""What an NVIDIA GPU does beside what the CPU does: every method, quantised bases, mixed batches, generation, training.

The CPU's fp32 is the oracle; other tests hold it to a dense one in fp64. Triton's kernels are compiled here; the tests
of each of them, in `kernels/`, run natively too where there is a GPU.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from contracts.cases import WORKING, attached, pristine
from contracts.test_matrix import excite
from contracts.test_rows import forward, furnished, inputs_of
from inlay.config_loading import load
from inlay.kernels import triton_select
from inlay.methods.base import methods
from inlay.quant import NF4, quantize
from inlay.train.paged import make_adamw
from inlay.train.run import train
from inlay.train.trained import open_trained
from tiny import batch, tiny
from train.worlds import data_file, model_folder

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SEVERAL = ("lora", "dora", "adalora", "ia3", "bottleneck", "prefix", "mam", "unipelt", "inlay")
ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Of a gradient, relative to the norm of all: bf16 rounds each of some ten products in a row to 1/256."""


def step(model: Any, adapter: Any, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients of the adapter, on the CPU."""
    for parameter in adapter.parameters():
        parameter.grad = None
    loss = model(**(inputs or batch(model))).loss
    loss.backward()
    named = adapter.named_parameters()
    return float(loss.detach()), {n: p.grad.detach().float().cpu() for n, p in named if p.grad is not None}


def assert_near(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]], error: float) -> None:
    """Equal losses and gradients, but for the rounding of a dtype."""
    assert ours[0] == pytest.approx(theirs[0], rel=error)
    assert ours[1].keys() == theirs[1].keys()
    whole = torch.stack([g.norm() for g in theirs[1].values()]).norm()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= error * whole, name


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(("name", "family"), WORKING)
def test_values_and_gradients_are_those_of_the_cpu(name: str, family: str, dtype: torch.dtype) -> None:
    model, adapter = attached(name, family)
    excite(adapter)
    theirs = step(model, adapter)
    if dtype == torch.bfloat16:
        model.to(dtype)
    model.to(DEVICE)
    assert_near(step(model, adapter), theirs, ERROR[dtype])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", SEVERAL)
def test_on_a_quantised_base(name: str, dtype: torch.dtype) -> None:
    made = []
    for device in ("cpu", DEVICE):
        model = quantize(tiny("llama"), NF4())
        torch.manual_seed(1)
        adapter = inlay.attach(model, methods()[name]())
        excite(adapter)
        if device != "cpu":
            model.to(device, dtype)
        made.append(step(model, adapter))
    assert_near(made[1], made[0], ERROR[dtype])


def test_quantised_on_the_gpu_it_has_the_bits_of_the_cpu() -> None:
    there, here = quantize(tiny("llama").to(DEVICE), NF4()), quantize(tiny("llama"), NF4())
    for name, value in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), value), name


@pytest.mark.parametrize("name", SEVERAL)
def test_on_a_base_that_bitsandbytes_quantised(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    made = []
    for ours in (True, False):
        model = tiny("llama", hidden_size=64, intermediate_size=128)
        if ours:
            quantize(model, NF4())
        else:
            for path, leaf in list(model.named_modules()):
                if isinstance(leaf, torch.nn.Linear) and path != "lm_head":
                    packed = bnb.nn.Linear4bit(leaf.in_features, leaf.out_features, False, quant_type="nf4")
                    packed.weight = bnb.nn.Params4bit(leaf.weight.detach(), False, quant_type="nf4", module=packed)
                    model.set_submodule(path, packed)
        model.to(DEVICE)
        torch.manual_seed(1)
        adapter = inlay.attach(model, methods()[name]())
        excite(adapter)
        made.append(step(model, adapter))
    assert_near(made[0], made[1], 1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_mixed_batch(family: str) -> None:
    model, names = furnished(family)
    entries = [names[i % len(names)] if i % 3 else None for i in range(2 * len(names))]
    with torch.no_grad(), inlay.use(model, entries):
        here = forward(model, inputs_of(model, len(entries), "right"))
    there = copy.deepcopy(model).to(DEVICE)
    inputs = {k: v.to(DEVICE) for k, v in inputs_of(model, len(entries), "right").items()}
    with inlay.use(there, entries):
        torch.testing.assert_close(forward(there, inputs).detach().cpu(), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_in_a_mixed_batch(family: str) -> None:
    model, names = furnished(family)
    entries = [None, *names]
    config = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with inlay.use(model, entries):
        here = model.generate(**batch(model, rows=len(entries), length=6, labels=False, padding="left"), **config)
    there = copy.deepcopy(model).to(DEVICE)
    with inlay.use(there, entries):
        inputs = batch(there, rows=len(entries), length=6, labels=False, padding="left")
        assert torch.equal(there.generate(**inputs, **config).cpu(), here)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "bottleneck"])
def test_checkpointing_draws_the_dropout_it_drew(name: str, reentrant: bool) -> None:
    model, adapter = attached(name, "llama", dropout=0.3)
    excite(adapter)
    model.to(DEVICE).train()
    model.enable_input_require_grads()
    made = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        made.append(step(model, adapter))
    assert_near(made[1], made[0], 1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "bitfit", "bottleneck", "prefix"])
def test_saved_on_the_gpu_and_loaded_on_the_cpu(name: str, tmp_path: Path) -> None:
    family = "gpt2" if name == "bitfit" else "llama"
    model, adapter = attached(name, family)
    excite(adapter)
    model.to(DEVICE)
    with torch.no_grad():
        there = model(**batch(model)).logits.cpu()
    adapter.save(tmp_path / "a")
    again = copy.deepcopy(pristine(family))
    loaded = inlay.load(again, tmp_path / "a")
    for key, value in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.cpu())
    with torch.no_grad():
        torch.testing.assert_close(again(**batch(again)).logits, there, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3"])
def test_merged_and_unmerged(name: str) -> None:
    model, adapter = attached(name, "llama")
    excite(adapter)
    model.to(DEVICE)
    with torch.no_grad():
        before = model(**batch(model)).logits
        adapter.merge()
        torch.testing.assert_close(model(**batch(model)).logits, before, rtol=1e-4, atol=1e-4)
        adapter.unmerge()
        assert torch.equal(model(**batch(model)).logits, before)


@pytest.mark.parametrize("name", ["lora", "bottleneck", "prefix"])
def test_under_autocast(name: str) -> None:
    model, adapter = attached(name, "llama")
    excite(adapter)
    theirs = step(model, adapter)
    model.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = step(model, adapter)
    assert_near(ours, theirs, ERROR[torch.bfloat16])


def test_compiled() -> None:
    model, adapter = attached("lora", "llama")
    excite(adapter)
    model.to(DEVICE)
    eager = step(model, adapter)
    assert_near(step(torch.compile(model), adapter, **batch(model)), eager, 1e-4)


def test_captured_in_a_graph_it_follows_new_inputs() -> None:
    model, adapter = attached("lora", "llama")
    excite(adapter)
    model.to(DEVICE)
    inputs, other = batch(model, labels=False), batch(model, labels=False, seed=1)
    triton_select.forget()
    with torch.no_grad():
        expected = model(**other).logits
        model(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(**inputs).logits
        for name, value in other.items():
            inputs[name].copy_(value)
        graph.replay()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizers(name: str) -> None:
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    model, adapter = attached("bottleneck", "llama")
    model.to(DEVICE)
    optimizer = make_adamw(name, list(adapter.parameters()), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(step(model, adapter)[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(
    ("family", "kind", "keys"),
    [
        ("llama", "prompted", {"method": "lora"}),
        ("llama", "prompted", {"method": "prefix", "gradient_checkpointing": True}),
        ("llama", "document", {"method": "lora", "quantization": "nf4", "optim": "paged_adamw_32bit"}),
        ("llama", "document", {"method": "dora", "packing": True, "torch_compile": True}),
        ("bert", "labelled", {"method": "lora", "fp16": True, "bf16": False}),
        ("bert", "tagged", {"method": "bitfit", "optim": "adamw_8bit"}),
        ("t5", "prompted", {"method": "bottleneck", "bf16": False}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else value,
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_a_whole_run(
    family: str, kind: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    if keys.get("optim") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    where = {
        "model": str(model_folder(tmp_path / family, family)),
        "data": str(data_file(tmp_path / f"{kind}.jsonl", kind)),
        "output_dir": str(tmp_path / "run"),
    }
    steps = {"max_steps": 40, "eval_steps": 20, "per_device_train_batch_size": 8, "generation_max_new_tokens": 4}
    result = train(load(None, [], where | steps | keys), quiet=True)
    trained = list(result.results.values())[-1]
    assert trained["loss"] < result.results["untouched"]["loss"]
    again = next(iter(open_trained(tmp_path / "run").evaluate().values()))
    assert again["loss"] == pytest.approx(trained["loss"], rel=1e-2)
