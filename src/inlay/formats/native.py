"""inlay's own adapter folder: `adapter.json` says what it is, `adapter.safetensors` holds the tensors.

A tensor is named by the module it stands at, the piece, and the parameter, as `model.layers.0.self_attn.q_proj.lora.A`.
The name under which an adapter was attached is no part of it. The folder appears whole or not at all, and is read
strictly: a missing, extra or wrong-shape tensor, a changed byte, another base or an unknown key is an error that lists
them all.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from inlay._version import __version__
from inlay.build import HEAD
from inlay.errors import FormatError, nearest
from inlay.folders import understood, write_folder
from inlay.formats.fingerprint import differences, fingerprint
from inlay.methods.base import from_spec
from inlay.sharded import fill, gathered, is_sharded, whole, writes
from inlay.state import state_of

if TYPE_CHECKING:
    from inlay.adapter import Adapter

VERSION = 1
CONFIG, TENSORS = "adapter.json", "adapter.safetensors"
KEYS = {
    "format", "format_version", "name", "method", "head", "labels", "sites", "tensors", "training_state", "base",
    "trained_parameters", "stored_parameters", "versions", "sha256", "checksum",
}  # fmt: skip
MOST_CONFIG_BYTES = 64 * 2**20


def save(adapter: Adapter, path: Path, *, keep_training_state: bool = False) -> Path:
    """Writes the folder and returns its path.

    Args:
        adapter: what to write.
        path: the folder; one that is there is replaced only if it is an adapter folder or empty.
        keep_training_state: also keep what is dropped after training (the prefix MLP, P-tuning's LSTM).

    Raises:
        FormatError: something that is not an adapter folder is in the way.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / CONFIG).exists())):
        raise FormatError(f"{path} is there already and is no adapter folder; choose another path or remove it.")
    with gathered(adapter.parameters()):
        tensors = adapter.state_dict() if keep_training_state else adapter.stored()
        tensors = {name: whole(t.detach()).to("cpu").contiguous() for name, t in _once(tensors).items()}
        blob = save_tensors(tensors, {"format": "pt"})
        config = _config(adapter, tensors, keep_training_state, blob)
    if any(is_sharded(parameter) for parameter in adapter.parameters()) and not writes():
        return path  # every process has gathered, one writes

    def fill(folder: Path) -> None:
        (folder / TENSORS).write_bytes(blob)
        (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    write_folder(path, fill, manifest=False)
    return path


def load(
    model: nn.Module, path: Path, name: str | None = None, *, allow_other_base: bool = False, trainable: bool = True
) -> Adapter:
    """Attaches the adapter of a folder; the model is untouched if anything is wrong.

    Args:
        model: the base model.
        path: the folder.
        name: how to call it; by default as it was called when saved.
        allow_other_base: accept a base whose values differ from those the adapter was trained on.
        trainable: False freezes the adapter's parameters, for inference without `torch.no_grad`.

    Raises:
        FormatError: the folder is damaged, incomplete, newer, or belongs to another base.
    """
    from inlay.adapter import attach

    config = read_config(path)
    with understood(path / CONFIG, FormatError):
        tensors = read_tensors(path, config)
        if not allow_other_base:
            _check_base(model, config, path)
        method, heads = from_spec(config["method"]), [str(head) for head in config["head"]]
    adapter = attach(model, method, name or str(config["name"]), head=heads or None)
    try:
        _fill(adapter, tensors, bool(config["training_state"]), path)
    except BaseException:
        adapter.detach()
        raise
    if not trainable:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter


def refill(adapter: Adapter, path: Path) -> None:
    """Puts the tensors of a folder into an adapter that is attached already, of the same method and sites.

    Raises:
        FormatError: the folder is damaged, or was saved by an adapter of another form.
    """
    config = read_config(path)
    with understood(path / CONFIG, FormatError):
        tensors = read_tensors(path, config)
    _fill(adapter, tensors, bool(config["training_state"]), path)


def base_of(adapter: Adapter) -> dict[str, Any]:
    """The fingerprint of an adapter's base, taken once, before anything is merged into it."""
    state = state_of(adapter.model)
    assert state is not None
    if state.fingerprint is None:
        state.fingerprint = fingerprint(adapter.model)
    return state.fingerprint


def _config(adapter: Adapter, tensors: dict[str, Tensor], training_state: bool, blob: bytes) -> dict[str, Any]:
    import transformers

    model_config = getattr(adapter.model, "config", None)
    heads = sorted(key.removesuffix(f".{HEAD}") for key in adapter.pieces if key.endswith(f".{HEAD}"))
    labels = getattr(model_config, "id2label", None) if heads else None
    config: dict[str, Any] = {
        "format": "inlay",
        "format_version": VERSION,
        "name": adapter.name,
        "method": adapter.method.spec(),
        "head": heads,
        "labels": [str(label) for _, label in sorted(labels.items())] if labels else None,
        "sites": [
            {"site": s.name, "enter": s.enter, "leave": s.leave, "tap": s.tap, "sizes": [s.in_features, s.out_features]}
            for s in adapter.sites
        ],
        "tensors": {n: {"shape": list(t.shape), "dtype": _dtype(t)} for n, t in sorted(tensors.items())},
        "training_state": training_state,
        "base": {
            "name_or_path": str(getattr(model_config, "_name_or_path", "") or ""),
            "class": type(adapter.model).__name__,
            "model_type": str(getattr(model_config, "model_type", "") or ""),
            "fingerprint": base_of(adapter),
        },
        "trained_parameters": adapter.trained_parameters,
        "stored_parameters": sum(t.numel() for t in tensors.values()),
        "versions": {
            "inlay": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    config["checksum"] = _checksum(config)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """`adapter.json`, checked: form, version, keys, checksum.

    Raises:
        FormatError: anything is wrong with it.
    """
    file = path / CONFIG
    try:
        size = file.stat().st_size
        text = file.read_text(encoding="utf-8") if size <= MOST_CONFIG_BYTES else ""
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "inlay":
        raise FormatError(f"{file} is not an inlay adapter (its 'format' is not 'inlay').")
    version = config.get("format_version")
    if not isinstance(version, int) or version > VERSION:
        raise FormatError(
            f"{file} has format version {version!r}; this inlay ({__version__}) reads up to {VERSION}. Update inlay."
        )
    extra, missing = sorted(config.keys() - KEYS), sorted(KEYS - config.keys())
    if extra or missing:
        hint = "; ".join(f"{k!r}: {nearest(k, KEYS)}" for k in extra)
        raise FormatError(f"{file}: unknown keys {extra} ({hint}), missing keys {missing}.")
    if config["checksum"] != _checksum(config):
        raise FormatError(f"{file} was changed after it was written (checksum). Take a copy from its source.")
    return config


def read_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder, checked against its `adapter.json`.

    Raises:
        FormatError: the file is missing, cut short, changed, or holds other tensors than announced.
    """
    file = path / TENSORS
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error}") from error
    if hashlib.sha256(blob).hexdigest() != config["sha256"]:
        raise FormatError(
            f"{file} ({len(blob):,} bytes) is damaged: its SHA-256 is not the one in {CONFIG}. It was cut short or "
            "changed; take a copy from its source."
        )
    try:
        tensors = load_tensors(blob)
    except Exception as error:
        raise FormatError(f"{file} is not a safetensors file: {error}") from error
    announced = {n: tuple(t["shape"]) for n, t in config["tensors"].items()}
    _compare(announced, {n: tuple(t.shape) for n, t in tensors.items()}, f"{file} against {CONFIG}")
    return tensors


def _fill(adapter: Adapter, tensors: dict[str, Tensor], training_state: bool, path: Path) -> None:
    resize_heads(adapter, tensors)
    if training_state:
        for key, piece in adapter.pieces.items():
            # Saved by a piece that had dropped its reparametrisation before: take that form first.
            spec = {n: f"{key}.{n}" for n in piece.stored_spec()}
            if spec.keys() != piece.state_dict().keys() and all(n in tensors for n in spec.values()):
                piece.load_stored({n: tensors[name] for n, name in spec.items()})
        own = adapter.state_dict()
        shared = own.keys() - _once(own).keys()
        wanted = {n: tuple(t.shape) for n, t in own.items() if n not in shared}
        _compare(wanted, {n: tuple(t.shape) for n, t in tensors.items()}, str(path))
        with torch.no_grad():
            for name, tensor in tensors.items():
                fill(own[name], tensor)
        return
    first = _first_names(adapter)
    specs = {
        f"{key}.{n}": tuple(shape) for key, piece in adapter.pieces.items() for n, shape in piece.stored_spec().items()
    }
    wanted = {n: shape for n, shape in specs.items() if first.get(n, n) == n}
    _compare(wanted, {n: tuple(t.shape) for n, t in tensors.items()}, str(path))
    for key, piece in adapter.pieces.items():
        names = piece.stored_spec()
        piece.load_stored({n: tensors[first.get(f"{key}.{n}", f"{key}.{n}")] for n in names})


def _first_names(adapter: Adapter) -> dict[str, str]:
    """For each stored tensor, the name under which its storage is kept: its own, or that of the one it is tied to."""
    names: dict[str, str] = {}
    storages: dict[int, str] = {}
    # All at once: a piece may compute what it stores, and a freed tensor's address would look like a tied one.
    stored = {key: piece.stored() for key, piece in adapter.pieces.items()}
    for key, tensors in stored.items():
        for name, tensor in tensors.items():
            names[f"{key}.{name}"] = storages.setdefault(_storage(tensor), f"{key}.{name}")
    return names


def _storage(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() and not tensor.is_meta and not is_sharded(tensor) else -id(tensor)


def resize_heads(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """A head may have another number of classes than the base's own: each adapter brings its own width."""
    for key, piece in adapter.pieces.items():
        module = getattr(piece, "module", None)
        weight = tensors.get(f"{key}.weight")
        if not key.endswith(f".{HEAD}") or not isinstance(module, nn.Linear) or weight is None:
            continue
        if weight.shape[0] != module.out_features and weight.shape[1:] == module.weight.shape[1:]:
            fresh = nn.Linear(module.in_features, weight.shape[0], module.bias is not None, device=module.weight.device)
            setattr(piece, "module", fresh)  # noqa: B010


def _check_base(model: nn.Module, config: dict[str, Any], path: Path) -> None:
    state = state_of(model)
    own = state.fingerprint if state is not None and state.fingerprint is not None else fingerprint(model)
    problems = differences(config["base"]["fingerprint"], own)
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise FormatError(
            f"{path} was trained on another base ({config['base']['class']} {config['base']['name_or_path']!r}) than "
            f"this {type(model).__name__}: {shown}. Load that base, or pass allow_other_base=True if this is intended."
        )


def _compare(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    both = sorted(wanted.keys() & found.keys())
    wrong = [f"{n}: {found[n]} instead of {wanted[n]}" for n in both if not _fits(found[n], wanted[n])]
    if missing or extra or wrong:
        lines = (
            [f"missing {n}" for n in missing] + [f"unexpected {n}" for n in extra] + [f"wrong shape {w}" for w in wrong]
        )
        raise FormatError(f"{where}: the tensors do not fit.\n  " + "\n  ".join(lines))


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is as wanted; -1 stands for any size (sparse storage)."""
    return len(found) == len(wanted) and all(w in (-1, f) for f, w in zip(found, wanted, strict=True))


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage under its first name only."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            kept[name] = tensor
    return kept


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _checksum(config: dict[str, Any]) -> str:
    body = {k: v for k, v in config.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
