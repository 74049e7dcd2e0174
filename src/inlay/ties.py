"""What a transformers model says of itself that a merge makes untrue: which weights are tied, how many labels it has.

`save_pretrained` and `from_pretrained` go by these; a merged model that still said "tied" could lose its head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ABSENT = object()


class Ties:
    """Remembers a model's declarations before a merge, corrects them after it, and puts them back."""

    def __init__(self, model: nn.Module) -> None:
        self._tied = [pair for pair in _declared(model).items() if _same(model, *pair)]
        self._undo: list[tuple[Any, str, Any]] = []

    def broken(self, model: nn.Module, attributes: dict[str, dict[str, Any]]) -> None:
        """Declares what is no longer tied, and a head of another width.

        Args:
            model: the merged model.
            attributes: what else changed on each module, by its path.
        """
        gone = [target for target, source in self._tied if not _same(model, target, source)]
        if gone:
            known = getattr(model, "all_tied_weights_keys", None)
            if isinstance(known, dict):
                kept = {target: source for target, source in known.items() if target not in gone}
                self._set(model, "all_tied_weights_keys", kept)
            if len(gone) == len(self._tied):
                for config in _configs(model):
                    if getattr(config, "tie_word_embeddings", False) and _may_untie(config):
                        self._set(config, "tie_word_embeddings", False)
        for path, changed in attributes.items():
            self._relabel(model, path, changed)

    def restore(self, model: nn.Module) -> None:
        """Puts every declaration back."""
        del model
        for owner, name, value in reversed(self._undo):
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
        self._undo.clear()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def _relabel(self, model: nn.Module, path: str, changed: dict[str, Any]) -> None:
        config, count = getattr(model, "config", None), changed.get("out_features")
        labels = getattr(config, "id2label", None)
        if count is None or not isinstance(labels, dict) or len(labels) == count or "." in path:
            return
        names = {i: f"LABEL_{i}" for i in range(count)}
        self._set(config, "id2label", names)
        self._set(config, "label2id", {name: i for i, name in names.items()})
        if hasattr(model, "num_labels"):
            self._set(model, "num_labels", count)


def _declared(model: nn.Module) -> dict[str, str]:
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    return dict(expand(all_submodels=True)) if expand is not None else {}


def _same(model: nn.Module, target: str, source: str) -> bool:
    try:
        return model.get_parameter(target) is model.get_parameter(source)
    except AttributeError:
        return False


def _configs(model: nn.Module) -> list[Any]:
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(found.values())


def _may_untie(config: Any) -> bool:
    """Whether the config can be read back as untied. T5's cannot: there the key also decides on a scaling."""
    wanted = {**config.to_dict(), "tie_word_embeddings": False}
    try:
        return bool(type(config).from_dict(dict(wanted)).to_dict() == wanted)
    except Exception:
        return False
