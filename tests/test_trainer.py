"""Hugging Face's Trainer trains the adapted model as it stands: it is still the same object of the same class."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import inlay
from tiny import batch, tiny


class Rows(Dataset):
    def __init__(self, model, count=16):
        tensors = batch(model, rows=count, padding="none")
        self.rows = [{k: v[i] for k, v in tensors.items()} for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def arguments(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-2,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**settings | changes)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", inlay.LoRA(rank=2)),
        ("bert", inlay.Bottleneck(size=3) + inlay.LoRA(rank=2, sites="attn.q")),
        ("t5", inlay.LoRA(rank=2, sites="attn.q")),
        ("bert", inlay.UniPELT(rank=2, length=2, mid=None)),
    ],
)
def test_trainer_moves_the_adapter_and_nothing_else(family, method, tmp_path):
    model = tiny(family)
    adapter = inlay.attach(model, method)
    base = {n: p.clone() for n, p in model.named_parameters() if ".inlay." not in n}
    before = {n: p.clone() for n, p in adapter.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(model))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    assert all(not torch.equal(before[n], p) for n, p in adapter.named_parameters())


def test_trainer_gives_what_a_bare_loop_gives(tmp_path):
    rows = Rows(tiny("llama"), 4)
    trained = {}
    for how in ("trainer", "loop"):
        model = tiny("llama")
        torch.manual_seed(5)
        adapter = inlay.attach(model, inlay.LoRA(rank=2))
        if how == "trainer":
            settings = arguments(tmp_path, max_steps=3, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0)
            Trainer(model=model, args=settings, train_dataset=rows).train()
        else:
            optimizer = torch.optim.SGD(adapter.parameters(), lr=5e-2)
            model.train()
            for _ in range(3):
                model(**{k: torch.stack([r[k] for r in rows]) for k in rows[0]}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        trained[how] = adapter.state_dict()
    for name, tensor in trained["loop"].items():
        torch.testing.assert_close(trained["trainer"][name], tensor, rtol=1e-4, atol=1e-6)


def test_trainer_with_gradient_checkpointing_trains_the_adapter(tmp_path):
    model = tiny("llama")
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    before = {n: p.clone() for n, p in adapter.named_parameters()}
    Trainer(model=model, args=arguments(tmp_path, gradient_checkpointing=True), train_dataset=Rows(model)).train()
    assert all(not torch.equal(before[n], p) for n, p in adapter.named_parameters())


def test_trainer_checkpoints_hold_base_and_adapter_and_load_back(tmp_path):
    model = tiny("llama")
    inlay.attach(model, inlay.LoRA(rank=2))
    settings = arguments(tmp_path, save_strategy="steps", save_steps=3)
    trainer = Trainer(model=model, args=settings, train_dataset=Rows(model))
    trainer.train()
    again = tiny("llama")
    adapter = inlay.attach(again, inlay.LoRA(rank=2))
    second = Trainer(model=again, args=settings, train_dataset=Rows(again))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in inlay.adapters(model)["default"].state_dict().items():
        torch.testing.assert_close(adapter.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
