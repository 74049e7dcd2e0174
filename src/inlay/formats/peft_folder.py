"""The files of a PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from inlay.errors import FormatError
from inlay.folders import write_folder

if TYPE_CHECKING:
    from inlay.adapter import Adapter
    from inlay.methods.base import Method

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"
MOST_CONFIG_BYTES = 64 * 2**20

COMMON = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save",
}  # fmt: skip

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


@dataclass(frozen=True)
class Folder:
    """What a folder holds, as it was written."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """The method's name in PEFT, for example "LORA"."""
        return str(self.config["peft_type"])

    def setting(self, name: str, default: Any) -> Any:
        """A value of the config; PEFT's default where the file has none."""
        value = self.config.get(name)
        return default if value is None else value


@dataclass(frozen=True)
class Reading:
    """What to attach for a folder, and how to fill it."""

    method: Method
    heads: tuple[str, ...]
    fill: Callable[[Adapter], None]


@dataclass(frozen=True)
class Writing:
    """What to write for an adapter: the method's name in PEFT, its settings, tensors by their names in the model."""

    kind: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def read_folder(path: Path) -> Folder:
    """Reads both files.

    Raises:
        FormatError: one is missing or damaged, or only the pickled form of the tensors is there.
    """
    file = path / CONFIG
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= MOST_CONFIG_BYTES else ""
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{file} names no peft_type, so it is not the config of a PEFT adapter.")
    blob = path / TENSORS
    if not blob.exists():
        raise FormatError(_no_tensors(path))
    try:
        tensors = load_tensors(blob.read_bytes())
    except Exception as error:
        raise FormatError(f"{blob} is not a complete safetensors file: {error}") from error
    return Folder(path, config, tensors)


def _no_tensors(path: Path) -> str:
    if (path / "adapter_model.bin").exists():
        return (
            f"{path} holds adapter_model.bin, a pickle, which can run code and is not read. Convert it where you trust "
            "it: save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors'), with "
            "save_file from safetensors.torch."
        )
    if list(path.glob("adapter_model*.safetensors*")):
        return f"{path} holds its tensors in several files; only one {TENSORS} is read. Merge them first."
    return f"{path} holds {CONFIG} but no {TENSORS}: the adapter was not saved completely."


def check_settings(
    folder: Folder, used: set[str], neutral: Mapping[str, Sequence[Any]], why: Mapping[str, str] | None = None
) -> None:
    """Refuses settings that would change the result and that inlay does not know.

    Args:
        folder: what was read.
        used: settings that the reader follows.
        neutral: settings that it does not, with the values that change nothing; nulls and empties never do.
        why: what a refused setting is, for the message.

    Raises:
        FormatError: one or more have another value; the message lists all.
    """
    problems = []
    for name, value in sorted(folder.config.items()):
        if name in used or name in COMMON or value is None or value is False or value in ("", [], {}):
            continue
        if value not in neutral.get(name, ()):
            note = (why or {}).get(name, "")
            problems.append(f"{name}={json.dumps(value)[:80]}" + (f" ({note})" if note else ""))
    if problems:
        raise FormatError(
            f"{folder.path / CONFIG} has settings that inlay cannot follow:\n  "
            + "\n  ".join(problems)
            + "\nOnly settings at their defaults may be unknown; the others change what the adapter computes."
        )


def no_format(adapter: Adapter) -> FormatError:
    """The error for an adapter that is none of PEFT's, or several of them at once."""
    return FormatError(
        "PEFT's format holds LoRA, DoRA, AdaLoRA, IA3, prompt tuning, P-tuning or prefix tuning, one of them at a "
        f'time, and this adapter is {adapter.method.title}. Save it with format="native".'
    )


def refuse(folder: Folder, problems: Sequence[str]) -> None:
    """One error for everything that does not fit.

    Raises:
        FormatError: there is at least one problem.
    """
    if problems:
        shown = [*problems[:40], *([f"and {len(problems) - 40} more"] if len(problems) > 40 else [])]
        raise FormatError(f"{folder.path}: the tensors do not fit this model.\n  " + "\n  ".join(shown))


def write(path: Path, adapter: Adapter, writing: Writing) -> Path:
    """Writes both files; the folder appears whole or not at all, the same bytes each time.

    Raises:
        FormatError: something that is no PEFT folder is in the way.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / CONFIG).exists())):
        raise FormatError(f"{path} is there already and is no PEFT folder; choose another path or remove it.")
    model = adapter.model
    task = task_of(model)
    config: dict[str, Any] = {
        "peft_type": writing.kind,
        "task_type": task,
        "auto_mapping": None if task else _auto_mapping(model),
        "base_model_name_or_path": str(getattr(getattr(model, "config", None), "_name_or_path", "") or "") or None,
        "revision": None,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        "modules_to_save": None,
        **writing.settings,
    }
    tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in sorted(writing.tensors.items())}
    blob = save_tensors(tensors, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)

    def fill(folder: Path) -> None:
        (folder / TENSORS).write_bytes(blob)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    write_folder(path, fill, manifest=False)
    return path


def task_of(model: nn.Module) -> str | None:
    """PEFT's name for what a model is for; None where it has none."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and not getattr(model.config, "is_encoder_decoder", False):
        return None
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    cls: Any = getattr(type(model), "base", type(model))
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
