"""Checkpoints of Hugging Face's Trainer, and of trainers made from it, without the frozen base in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inlay.errors import AdapterError
from inlay.hosts.saving import MARK, save_adapters
from inlay.sharded import gathered, whole
from inlay.state import adapters


class InlayCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Lets a Trainer write adapter-only checkpoints, and go on from them.

        Trainer(model, args, train_dataset=rows, callbacks=[inlay.InlayCallback()]).train()

    While it trains, `checkpoint-N/model.safetensors` holds the adapters' tensors alone, under their names in the model,
    so that `train(resume_from_checkpoint=...)` and `load_best_model_at_end` work as usual on a model with the same
    adapters attached; optimizer, schedule and random states lie beside it as the Trainer writes them. Each adapter is
    there also as a folder `adapters/<name>` for `inlay.load`. Afterwards the model saves itself whole again.

    Raises:
        AdapterError: training starts on a model without adapters.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """From now on the model saves its adapters alone."""
        model = _unwrapped(model)
        if not adapters(model):
            raise AdapterError(
                f"InlayCallback: no adapter is attached to this {type(model).__name__}; attach one first."
            )
        self._model = model

        def save(folder: str, *, is_main_process: bool = True, state_dict: Any = None, **options: Any) -> None:
            del options
            _save(model, Path(folder), state_dict, write=is_main_process)

        model.__dict__["save_pretrained"] = save

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model's own way of saving itself comes back."""
        if self._model is not None:
            self._model.__dict__.pop("save_pretrained", None)
            self._model = None


def _save(model: Any, folder: Path, state_dict: dict[str, Tensor] | None, *, write: bool) -> None:
    with gathered(p for n, p in model.named_parameters() if MARK in n):
        given = model.state_dict() if state_dict is None else state_dict
        tensors = {
            name: whole(t.detach()).to("cpu", copy=True).contiguous() for name, t in given.items() if MARK in name
        }
    save_adapters(model, folder, write=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if getattr(model, "config", None) is not None:
            model.config.save_pretrained(folder)


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module") and isinstance(model.module, nn.Module) and not adapters(model):
        model = model.module
    return model
