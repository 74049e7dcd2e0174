"""Reading PEFT folders of methods that act on modules: LoRA with its variants, AdaLoRA, IA3.

The tensors say which modules are adapted and at what rank; the config says how they are scaled. Both must agree: what
the config targets must have tensors, and no others may be there. Legend: R rank, I / O features, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy
from inlay.build import HEAD
from inlay.errors import InlayError
from inlay.formats.native import resize_heads
from inlay.formats.peft_folder import Folder, Reading, check_settings, refuse
from inlay.merge import original
from inlay.methods.adalora import AdaLoRA
from inlay.methods.base import Method, Mix, Piece
from inlay.methods.bitfit import BiasDelta, BitFit
from inlay.methods.dora import DoRA
from inlay.methods.full import Copy, Full
from inlay.methods.ia3 import IA3
from inlay.methods.lora import LoRA
from inlay.spelling import mapping, spell

if TYPE_CHECKING:
    from inlay.adapter import Adapter

PREFIX = "base_model.model."
PARTS = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(?P<weight>\.weight)?$"
)
WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")
TARGETING = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"}
LORA = TARGETING | {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
ADALORA = TARGETING | {"init_r", "target_r", "lora_alpha", "lora_dropout", "rank_pattern"}
ADALORA_TRAINING = {"tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "ensure_weight_tying": (True,),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
MERGED_INIT = (
    "this initialisation changes the base's weights; PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...) writes an equivalent plain LoRA"
)
WHY = {
    "init_lora_weights": MERGED_INIT,
    "lora_bias": "biases on B",
    "target_parameters": "LoRA on parameters that are no modules of their own",
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "repeated layers",
    "use_qalora": "QALoRA pools the input",
    "alora_invocation_tokens": "activated LoRA acts from a token on",
}


@dataclass
class Found:
    """The tensors of a folder, sorted: by adapted module, and what belongs to modules of the base itself."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    prefix: str = PREFIX


def sort_tensors(folder: Folder, modules: dict[str, nn.Module], prefix: str = PREFIX) -> Found:
    """Who each tensor belongs to."""
    found = Found(prefix=prefix)
    for name, tensor in sorted(folder.tensors.items()):
        if name.endswith(".ranknum"):
            continue  # written by older versions; always the initial rank
        if WRAPPED.search(name) and WRAPPED.sub(".", name) in folder.tensors:
            continue  # with bias="all", heads' biases are written a second time, and the unused original's
        if not name.startswith(prefix):
            found.problems.append(f"unexpected {name}")
            continue
        match = PARTS.match(name.removeprefix(prefix))
        if match is not None:
            path, part, into = match["path"], match["part"], found.modules
        else:
            path, _, part = name.removeprefix(prefix).replace(".base_layer.", ".").rpartition(".")
            into = found.base
        if path not in modules or (into is found.base and part not in modules[path]._parameters):
            found.problems.append(f"unexpected {name}: this model has no such module or parameter")
            continue
        into.setdefault(path, {})[part] = tensor
    return found


def read_lora(folder: Folder, model: nn.Module, modules: dict[str, nn.Module], anatomy: Anatomy) -> Reading:
    """LoRA, rsLoRA, DoRA; with biases, heads and embeddings."""
    check_settings(folder, LORA, NEUTRAL, WHY)
    found, dora = sort_tensors(folder, modules), bool(folder.setting("use_dora", False))
    _compare_with_targets(folder, found, modules, anatomy)
    rank, alpha = int(folder.setting("r", 8)), float(folder.setting("lora_alpha", 8))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, tensors in found.modules.items():
        ranks[path] = int(_pattern(folder, "rank_pattern", path, rank))
        alphas[path] = float(_pattern(folder, "alpha_pattern", path, alpha))
        out, into = _shape(found, path, modules[path])
        table = "_embedding" if isinstance(modules[path], nn.Embedding) else ""
        wanted = {f"lora{table}_A": (ranks[path], into), f"lora{table}_B": (out, ranks[path])}
        _compare(found, path, tensors, wanted | ({"lora_magnitude_vector": (out,)} if dora else {}))
    heads, biases = base_modules(folder, found, model, modules)
    refuse(folder, found.problems)
    method = (DoRA if dora else LoRA)(
        rank=mapping(ranks),
        alpha=mapping(alphas),
        dropout=float(folder.setting("lora_dropout", 0.0)),
        rslora=bool(folder.setting("use_rslora", False)),
        sites=spell(anatomy, ranks),
    )
    names = {"lora_A": "A", "lora_embedding_A": "A", "lora_B": "B", "lora_embedding_B": "B"}

    def own(path: str, piece: Piece) -> dict[str, Tensor]:
        del piece
        return {names.get(part, "m"): tensor for part, tensor in found.modules[path].items()}

    return _reading(anatomy, method, heads, biases, found, own)


def read_adalora(folder: Folder, model: nn.Module, modules: dict[str, nn.Module], anatomy: Anatomy) -> Reading:
    """AdaLoRA with the ranks that were kept. The divisor of its scale stays the initial rank."""
    check_settings(folder, ADALORA | ADALORA_TRAINING, NEUTRAL | {"r": (8, folder.config.get("init_r"))}, WHY)
    found, rank = sort_tensors(folder, modules), int(folder.setting("init_r", 12))
    _compare_with_targets(folder, found, modules, anatomy)
    alpha = float(folder.setting("lora_alpha", 8))
    kept: dict[str, Tensor] = {}
    pattern = {
        key.removeprefix(PREFIX).partition(".lora_E")[0]: mask
        for key, mask in (folder.config.get("rank_pattern") or {}).items()
    }
    for path, tensors in found.modules.items():
        kept[path] = torch.tensor(pattern.get(path, [True] * rank), dtype=torch.bool).reshape(-1)
        if len(kept[path]) != rank:
            found.problems.append(f"rank_pattern of {path} has {len(kept[path])} entries instead of init_r={rank}")
        out, into = _shape(found, path, modules[path])
        k = int(kept[path].sum())
        _compare(found, path, tensors, {"lora_A": (k, into), "lora_B": (out, k), "lora_E": (k, 1)})
    heads, biases = base_modules(folder, found, model, modules)
    refuse(folder, found.problems)
    method = AdaLoRA(
        init_rank=rank,
        target_rank=min(rank, int(folder.setting("target_r", 8))),
        alpha=alpha if alpha > 0 else rank,
        dropout=float(folder.setting("lora_dropout", 0.0)),
        sites=spell(anatomy, kept),
    )

    def own(path: str, piece: Piece) -> dict[str, Tensor]:
        del piece
        parts = found.modules[path]
        return {
            "Q": parts["lora_A"],
            "P": parts["lora_B"],
            "Lambda": parts["lora_E"].reshape(-1),
            "kept": kept[path],
        }

    return _reading(anatomy, method, heads, biases, found, own)


def read_ia3(folder: Folder, model: nn.Module, modules: dict[str, nn.Module], anatomy: Anatomy) -> Reading:
    """IA3: what leaves a module is rescaled, or what enters it where it is named among the feed-forward modules."""
    check_settings(folder, TARGETING | {"feedforward_modules"}, {"init_ia3_weights": (True,)})
    found = sort_tensors(folder, modules)
    _compare_with_targets(folder, found, modules, anatomy)
    entering = {p for p in found.modules if _named(folder.config.get("feedforward_modules"), p)}
    for path, tensors in found.modules.items():
        out, into = _shape(found, path, modules[path])
        _compare(found, path, tensors, {"ia3_l": (1, into) if path in entering else (out, 1)})
    heads, biases = base_modules(folder, found, model, modules)
    refuse(folder, found.problems)
    leaving = [p for p in found.modules if p not in entering]
    sites = (*spell(anatomy, leaving), *(f"{selector}:input" for selector in spell(anatomy, entering)))

    def own(path: str, piece: Piece) -> dict[str, Tensor]:
        del piece
        return {"l": found.modules[path]["ia3_l"].reshape(-1)}

    return _reading(anatomy, IA3(sites=sites), heads, biases, found, own)


def _reading(
    anatomy: Anatomy, method: Method, heads: tuple[str, ...], biases: dict[str, Tensor], found: Found, own: Any
) -> Reading:
    whole: Method = Mix(methods=(method, BitFit(sites=spell(anatomy, biases)))) if biases else method

    def fill(adapter: Adapter) -> None:
        fill_heads(adapter, found)
        for piece, site in zip(adapter.pieces.values(), adapter.sites, strict=True):
            if isinstance(piece, Copy):
                continue
            if isinstance(piece, BiasDelta):
                bias = original(adapter.model, site.leave, "bias")
                assert bias is not None
                stored = biases[site.leave].to(bias.device, torch.float32)
                piece.load_stored({"b": stored - bias.detach().float()})
            else:
                piece.load_stored(own(site.leave, piece))

    return Reading(whole, heads, fill)


def fill_heads(adapter: Adapter, found: Found) -> None:
    """Puts the tensors of modules that were trained as a whole into the copies that stand for them."""
    resize_heads(adapter, {f"{path}.{HEAD}.{n}": t for path, tensors in found.base.items() for n, t in tensors.items()})
    for piece, site in zip(adapter.pieces.values(), adapter.sites, strict=True):
        if isinstance(piece, Copy):
            piece.load_stored(found.base[site.leave])


def read_norms(folder: Folder, model: nn.Module, modules: dict[str, nn.Module], anatomy: Anatomy) -> Reading:
    """LayerNorm tuning: norms that were trained as a whole."""
    check_settings(folder, TARGETING, {})
    renamed = {name.replace(".ln_tuning_layers.", "."): t for name, t in folder.tensors.items()}
    found = sort_tensors(Folder(folder.path, folder.config, renamed), modules)
    norms = {
        name.removeprefix(PREFIX).partition(".ln_tuning_layers.")[0] for name in folder.tensors if ".ln_tuning" in name
    }
    heads, _ = base_modules(folder, found, model, modules)
    refuse(folder, found.problems)
    return Reading(
        Full(sites=spell(anatomy, norms)), tuple(h for h in heads if h not in norms), lambda a: fill_heads(a, found)
    )


def base_modules(
    folder: Folder, found: Found, model: nn.Module, modules: dict[str, nn.Module]
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Modules that were trained as a whole, and biases that were trained by themselves."""
    heads: list[str] = []
    biases: dict[str, Tensor] = {}
    saved = folder.config.get("modules_to_save") or []
    for path, tensors in sorted(found.base.items()):
        own = {n: p for n, p in modules[path]._parameters.items() if p is not None}
        if path in found.modules and "weight" in tensors:
            # PEFT writes a targeted embedding's own weight along.
            if not _same(tensors["weight"], original(model, path, "weight")):
                found.problems.append(
                    f"{path} brings a weight of its own that is not this model's (resized vocabulary?)"
                )
            tensors = {n: t for n, t in tensors.items() if n != "weight"}
            if not tensors:
                continue
        if set(tensors) == {"bias"} and set(own) != {"bias"}:
            if tensors["bias"].shape != own["bias"].shape:
                found.problems.append(f"wrong shape {path}.bias: {tuple(tensors['bias'].shape)}")
            biases[path] = tensors["bias"]
            continue
        missing = [f"missing {found.prefix}{path}.{n}" for n in own if n not in tensors]
        wrong = [
            f"wrong shape {path}.{n}: {tuple(t.shape)} instead of {tuple(own[n].shape)}"
            for n, t in tensors.items()
            if t.shape != own[n].shape and (t.shape[1:] != own[n].shape[1:] or not isinstance(modules[path], nn.Linear))
        ]
        found.problems += missing + wrong
        heads.append(path)
    found.problems += _bias_problems(folder, found, modules, heads, biases)
    wanted = {p for p in modules for s in saved if p.endswith(s) and dict(modules[p].named_parameters())}
    for path in sorted(wanted):
        if not any(h == path or h.startswith(path + ".") for h in heads):
            found.problems.append(f"missing {found.prefix}{path}.* (named in modules_to_save)")
    return tuple(heads), biases


def _bias_problems(
    folder: Folder, found: Found, modules: dict[str, nn.Module], heads: list[str], biases: dict[str, Tensor]
) -> list[str]:
    """The biases that the setting "bias" speaks of, no more and no fewer."""
    mode = folder.setting("bias", "none")
    if mode not in ("none", "all", "lora_only"):
        return [f"bias={mode!r} is not known"]
    wanted = {
        path
        for path, module in modules.items()
        if isinstance(module._parameters.get("bias"), nn.Parameter)
        and path not in heads
        and (mode == "all" or (mode == "lora_only" and path in found.modules))
    }
    missing = [f"missing {PREFIX}{path}.bias (bias={mode!r})" for path in sorted(wanted - biases.keys())]
    return missing + [f"unexpected {PREFIX}{path}.bias (bias={mode!r})" for path in sorted(biases.keys() - wanted)]


def _same(stored: Tensor, own: nn.Parameter | None) -> bool:
    return own is not None and stored.shape == own.shape and torch.equal(stored.to(own.dtype), own.detach().cpu())


def _compare_with_targets(folder: Folder, found: Found, modules: dict[str, nn.Module], anatomy: Anatomy) -> None:
    """Every module that the config targets must have tensors, and no other may."""
    targets = folder.config.get("target_modules")
    if not targets or targets == "all-linear":
        return
    wanted = {path for path in modules if path in anatomy.leaves and targeted(folder, path)}
    found.problems += [
        f"missing {PREFIX}{path}.* (named in target_modules)" for path in sorted(wanted - found.modules.keys())
    ]
    found.problems += [
        f"unexpected {PREFIX}{path}.*: not in target_modules" for path in sorted(found.modules.keys() - wanted)
    ]


def targeted(folder: Folder, path: str) -> bool:
    """Whether a module is adapted by this config: PEFT's rules."""
    if _named(folder.config.get("exclude_modules"), path):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in folder.config.get("modules_to_save") or ()):
        return False
    if not _named(folder.config["target_modules"], path):
        return False
    layers = folder.config.get("layers_to_transform")
    if isinstance(folder.config["target_modules"], str) or layers is None or layers == []:
        return True
    patterns = folder.config.get("layers_pattern") or []
    found = [
        re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", path) for p in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    found = found or [re.match(r".*?\.[^.]*\.(\d+)\.", path)]
    index = next((int(m[1]) for m in found if m is not None), None)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _named(names: str | Iterable[str] | None, path: str) -> bool:
    """A string is a regular expression for whole paths, a list has ends of paths."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _pattern(folder: Folder, name: str, path: str, default: float) -> float:
    for key, value in (folder.config.get(name) or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return float(value)
    return default


def _shape(found: Found, path: str, module: nn.Module) -> tuple[int, int]:
    from inlay.quant.bridge import logical_shape

    try:
        return logical_shape(module)
    except InlayError as error:
        found.problems.append(f"{path}: {error}")
        return -1, -1


def _compare(found: Found, path: str, tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    found.problems += [f"missing {PREFIX}{path}.{part}" for part in wanted if part not in tensors]
    found.problems += [f"unexpected {PREFIX}{path}.{part}" for part in tensors if part not in wanted]
    found.problems += [
        f"wrong shape {path}.{part}: {tuple(tensors[part].shape)} instead of {shape}"
        for part, shape in wanted.items()
        if part in tensors and tuple(tensors[part].shape) != shape
    ]
