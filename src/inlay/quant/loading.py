"""Quantise while loading: each weight is packed as soon as it is read, so the dense model is never in memory.

transformers drives it (its renamings, merges and ties stay in force); this file gives it a quantiser of its own and
the checkpoint as slices that are read when asked for. They are read, not mapped: pages of a mapped file count as
memory in use until the file is closed.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from inlay.errors import QuantizationError
from inlay.quant.base import BlockQuantization, QuantState
from inlay.quant.format import CONFIGS, KEYS, from_tensors
from inlay.quant.linear import Linear4
from inlay.quant.model import pack, prepare
from inlay.quant.nf4 import NF4
from inlay.quant.selection import config_entry, dense_patterns, select, warn_about_dense_rest

_METHOD = "inlay_4bit"


_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_quantized(
    path: str | Path,
    auto_class: Any = AutoModelForCausalLM,
    config: BlockQuantization | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint with its linear layers in 4 bits, packing one weight after the other.

    Memory in use stays below the quantised model plus the largest tensor (`benchmarks/quant_memory.py`).

    Args:
        path: a folder with `config.json` and safetensors, in one file or in shards; or a name on the hub. The
            checkpoint may be dense, or 4-bit as saved by inlay or by transformers with bitsandbytes.
        auto_class: an `AutoModelFor...` or a model class of transformers.
        config: `NF4(...)`, `FP4(...)` or `Int4(...)`. For a dense checkpoint None is `NF4()`; for one that is 4-bit
            already the stored settings hold, and of `config` only `compute_dtype` is taken.
        kwargs: for `from_pretrained`, such as `dtype`, `device_map`, `attn_implementation`.

    Returns:
        The model; with `output_loading_info=True` the pair that `from_pretrained` gives then.

    Raises:
        QuantizationError: no safetensors, a checkpoint quantised in another way, or settings that contradict it.
    """
    folder = _folder(path, kwargs.pop("revision", None))
    model_config = kwargs.pop("config", None)
    if model_config is None:  # fields of the config among kwargs go there, as in from_pretrained
        kept: dict[str, Any] = {key: kwargs.pop(key) for key in ("dtype", "trust_remote_code") if key in kwargs}
        model_config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kept, **kwargs)
        kwargs |= kept
    cls, model_config = _model_class(auto_class, model_config, kwargs)
    stored = getattr(model_config, "quantization_config", None)
    settings: dict[str, Any] = {"quant_method": _METHOD}
    if stored is None:
        settings["config"] = config or NF4()
        kwargs["quantization_config"] = _Settings(**settings)
    else:
        settings["config"] = _stored_config(_as_dict(stored), config)
        model_config.quantization_config = settings
    with ExitStack() as files:
        slices = {
            key: file.get_slice(key)
            for file in [files.enter_context(_open(name)) for name in _weight_files(folder)]
            for key in file.keys()  # noqa: SIM118 (not a dict)
        }
        loaded: Any = cls.from_pretrained(None, config=model_config, state_dict=slices, **kwargs)
    model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config._name_or_path = model.name_or_path = str(path)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def _model_class(auto_class: Any, config: Any, kwargs: dict[str, Any]) -> tuple[type[PreTrainedModel], Any]:
    """The class that an auto class chooses, and the part of the config that it takes.

    An auto class needs a path to load from, a model class takes slices; so the former builds an empty model first.
    """
    if issubclass(auto_class, PreTrainedModel):
        return auto_class, config
    trust = kwargs.pop("trust_remote_code", None)
    with torch.device("meta"):
        empty = auto_class.from_config(config, trust_remote_code=trust)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        empty.config.quantization_config = stored
    return type(empty), empty.config


def _folder(path: str | Path, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    if not _HUB_NAME.fullmatch(str(path)):
        raise QuantizationError(f"{path}: there is no such folder, and a name on the hub is written org/name")
    patterns = ["*.safetensors", "*.json", "*.py"]
    return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise QuantizationError(
            f"{folder} has no {absent[0]}; quantising while loading reads safetensors "
            "(load the model as usual and save it with save_pretrained to get them)"
        )
    return [folder / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except TypeError:  # safetensors before 0.8 always maps the file
        return safe_open(file, framework="pt")


def _as_dict(stored: Any) -> dict[str, Any]:
    return dict(stored if isinstance(stored, dict) else stored.to_dict())


def _stored_config(stored: dict[str, Any], asked: BlockQuantization | None) -> BlockQuantization:
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit"):
        kind = stored.get("quant_method")
        raise QuantizationError(
            f"the checkpoint is quantised with {kind!r}, not with 4-bit bitsandbytes; load it with from_pretrained"
        )
    name = stored.get("bnb_4bit_quant_type", "fp4")
    if name not in CONFIGS:
        raise QuantizationError(f"the checkpoint is stored as {name!r}; known are {sorted(CONFIGS)}")
    cls = CONFIGS[name]
    if asked is not None and not isinstance(asked, cls):
        raise QuantizationError(f"the checkpoint is stored as {name}, so it cannot be loaded as {asked.quant_type}")
    return cls(
        double_quant=bool(stored.get("bnb_4bit_use_double_quant")),
        compute_dtype=None if asked is None else asked.compute_dtype,
        storage=stored.get("bnb_4bit_quant_storage") or "uint8",
    )


@register_quantization_config(_METHOD)
class _Settings(QuantizationConfigMixin):
    """How transformers carries our config to the quantiser."""

    def __init__(self, config: BlockQuantization, quant_method: str = _METHOD) -> None:
        self.config = config
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own registry takes any name


class _Pack(ConversionOps):
    """Dense weight in, packed bytes out; the scales wait in the quantiser until loading is over."""

    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            result[name] = self.hf_quantizer.pack(name, dense)
        return result


class _Unpack(ConversionOps):
    """Packed bytes and the tensors beside them in, packed bytes out."""

    def __init__(self, hf_quantizer: _Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unpack:
        return self  # transformers copies operations for each tensor; the quantiser must stay the one

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        assert full_layer_name is not None
        if set(tensors) == {"weight"}:  # a norm, an embedding, a layer that was skipped
            return input_dict
        packed = tensors.pop("weight")
        stored = {key.removeprefix("weight."): value for key, value in tensors.items()}
        assert model is not None
        self.hf_quantizer.adopt(model, full_layer_name)
        self.hf_quantizer.keep(full_layer_name, from_tensors(stored, packed.device))
        return {"weight": nn.Parameter(packed, requires_grad=False)}


def _unpacks(conversion: Any) -> bool:
    return any(isinstance(operation, _Unpack) for operation in getattr(conversion, "operations", ()))


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """The part of transformers' loader that knows 4-bit layers."""

    serialized_names = {"weight": ["weight", *(f"weight.{key}" for key in KEYS)]}

    def __init__(self, quantization_config: _Settings, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config.config
        self.states: dict[str, QuantState] = {}
        self.layers: dict[str, Linear4] = {}
        self.transposed: set[str] = set()
        self.skip: list[str] = []

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            return  # the checkpoint says which layers are packed, not the rule
        chosen, self.skip = select(model, self.config)
        for name, module in chosen.items():
            if isinstance(module, Conv1D):
                self.transposed.add(name)
            self.layers[name] = prepare(module, self.config)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, name = param_name.rpartition(".")
        return name == "weight" and layer in self.layers

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Unpack}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Asked by every version; older ones (5.17) know nothing of `get_load_operations`."""
        if not self.pre_quantized:
            return []
        names = [*(f"weight.{key}" for key in KEYS), "weight"]  # the shortest, which is in all of them, last
        return [WeightConverter(names, "weight", [_Unpack(self)])]

    def pack(self, name: str, dense: Tensor) -> nn.Parameter:
        """Pack one weight and keep its state under the layer's path."""
        layer = name.removesuffix(".weight")
        try:
            packed, state = pack(dense.t() if layer in self.transposed else dense, self.config)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from None
        self.keep(name, state)
        return nn.Parameter(packed, requires_grad=False)

    def adopt(self, model: nn.Module, name: str) -> None:
        """Prepare a layer that the checkpoint holds packed."""
        layer = name.removesuffix(".weight")
        module = model.get_submodule(layer)
        if type(module) not in (nn.Linear, Conv1D):
            raise QuantizationError(f"{layer} is packed in the checkpoint and a {type(module).__name__} in the model")
        self.layers[layer] = prepare(module, self.config)

    def keep(self, name: str, state: QuantState) -> None:
        """Remember a state until the end: transformers empties non-persistent buffers after loading."""
        layer = name.removesuffix(".weight")
        self.states[layer] = state
        self.layers[layer]._is_hf_initialized = True  # type: ignore[assignment]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, layer in self.layers.items():
            if name not in self.states:  # not in the checkpoint, so freshly initialised
                layer.weight = self.pack(name, layer.weight.detach())
            layer.store(layer.weight.detach(), self.states[name])
        if self.pre_quantized:
            self.skip = dense_patterns(model)
        warn_about_dense_rest(model, self.skip)
        model.config.quantization_config = config_entry(model, self.config, self.skip)
        # Saving reverses the conversions of loading; unpacking left nothing to reverse.
        conversions = getattr(model, "_weight_conversions", None) or []
        model.__dict__["_weight_conversions"] = [c for c in conversions if not _unpacks(c)]
        # With these transformers and its Trainer take the model for one that only PEFT can train.
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            delattr(model, attribute)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
