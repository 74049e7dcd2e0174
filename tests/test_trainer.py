"""Hugging Face's Trainer trains the adapted model as it stands: it is still the same object of the same class."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import inlay
from inlay.errors import AdapterError
from tiny import batch, tiny
from train.worlds import rows, tokenizer


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
    examples = Rows(tiny("llama"), 4)
    trained = {}
    for how in ("trainer", "loop"):
        model = tiny("llama")
        torch.manual_seed(5)
        adapter = inlay.attach(model, inlay.LoRA(rank=2))
        if how == "trainer":
            settings = arguments(tmp_path, max_steps=3, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0)
            Trainer(model=model, args=settings, train_dataset=examples).train()
        else:
            optimizer = torch.optim.SGD(adapter.parameters(), lr=5e-2)
            model.train()
            for _ in range(3):
                model(**{k: torch.stack([r[k] for r in examples]) for k in examples[0]}).loss.backward()
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
    with pytest.warns(UserWarning, match="InlayCallback"):
        trainer.train()
    again = tiny("llama")
    adapter = inlay.attach(again, inlay.LoRA(rank=2))
    second = Trainer(model=again, args=settings, train_dataset=Rows(again))
    with pytest.warns(UserWarning, match="InlayCallback"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in inlay.adapters(model)["default"].state_dict().items():
        torch.testing.assert_close(adapter.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_callback_checkpoints_hold_the_adapter_alone_and_are_gone_on_with(tmp_path):
    """AdaLoRA carries a schedule and running averages: a resumed run must end where the straight one does."""
    final = {}
    for how in ("straight", "resumed"):
        model = tiny("llama")
        torch.manual_seed(5)
        adapter = inlay.attach(model, inlay.AdaLoRA(target_rank=2, init_rank=3, total_steps=6, warmup=1, final=1))
        settings = arguments(tmp_path / "out", save_strategy="steps", save_steps=3)
        again = how == "resumed"
        if again:
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(1.0)  # what the checkpoint must overwrite
        trainer = Trainer(model=model, args=settings, train_dataset=Rows(model), callbacks=[inlay.InlayCallback()])
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3") if again else None)
        final[how] = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        assert "save_pretrained" not in model.__dict__
    for name, tensor in final["straight"].items():
        torch.testing.assert_close(final["resumed"][name], tensor, rtol=1e-5, atol=1e-6)
    folder = tmp_path / "out" / "checkpoint-6"
    held = load_file(folder / "model.safetensors")
    assert held
    assert all(".inlay.default." in name for name in held)
    base = sum(p.numel() for p in tiny("llama").parameters())
    assert sum(tensor.numel() for tensor in held.values()) < base / 2
    other = tiny("llama")
    inlay.load(other, folder / "adapters" / "default")
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch(m)).logits for m in (model, other))
    torch.testing.assert_close(ours, theirs)


def test_callback_without_an_adapter_is_an_error(tmp_path):
    model = tiny("llama")
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=Rows(model), callbacks=[inlay.InlayCallback()]
    )
    with pytest.raises(AdapterError, match="InlayCallback: no adapter is attached to this LlamaForCausalLM"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_trls_sft_trainer_moves_the_adapter_and_nothing_else(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset as Table

    model = tiny("llama")
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    base = {n: p.clone() for n, p in model.named_parameters() if ".inlay." not in n}
    before = {n: p.clone() for n, p in adapter.named_parameters()}
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=5e-2, report_to=[],
        save_strategy="steps", save_steps=4, logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True,
        max_length=32,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Table.from_list([{"text": row["text"]} for row in rows("labelled", 16)]),
        processing_class=tokenizer("llama"),
        callbacks=[inlay.InlayCallback()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    assert all(not torch.equal(before[n], p) for n, p in adapter.named_parameters())
    assert all(".inlay." in name for name in load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
