"""attach, detach, use, load: what a user does with adapters, and the handle that they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from inlay.anatomy import Site, anatomy
from inlay.anatomy.probe import modules_of
from inlay.build import HEAD, Built, build, heads
from inlay.errors import AdapterError, AttachmentError, FormatError, MethodError, nearest
from inlay.hosts import insert
from inlay.hosts.base import Host, is_intact, remove
from inlay.hosts.model import ModelHost, hosts_rows, tell_padding
from inlay.hosts.reversible import surround
from inlay.hosts.saving import keep_adapters
from inlay.methods.base import Method, Piece, VirtualTokens
from inlay.route import Group, everyone
from inlay.sharded import fill, gathered, is_sharded, whole, writes
from inlay.state import STATE, State, Use, adapters, known_name, require, state_of, use

if TYPE_CHECKING:
    from inlay.merge import MergeReport


class Adapter:
    """One adapter on one model: what it trains, how to save it, how to take it out.

    Attributes:
        name: the name it was attached under.
        method: the configuration it was built from.
        sites: every site it occupies, in the order of the model.
        model: the model it is attached to.
    """

    def __init__(self, name: str, method: Method, model: nn.Module) -> None:
        self.name = name
        self.method = method
        self.model = model
        self.sites: list[Site] = []
        self.pieces: dict[str, Piece] = {}
        self.paths: list[str] = []
        self.merged = False
        self._merge_record: Any = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by its name on disk."""
        seen: set[int] = set()
        for key, piece in self.pieces.items():
            for name, parameter in piece.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{key}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter once, head included: what an optimizer takes."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that receive gradients during training, head included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def stored_parameters(self) -> int:
        """Number of values in the adapter file. Smaller than trained where a method drops a reparametrisation."""
        return sum(t.numel() for t in self.stored().values())

    @property
    def head_parameters(self) -> int:
        """Number of trained parameters that belong to the task head."""
        return sum(p.numel() for n, p in self.named_parameters() if f".{HEAD}." in f".{n}")

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the adapter file, each storage once."""
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, piece in self.pieces.items():
            for name, part in piece.stored().items():
                tensor = whole(part)
                storage = tensor.data_ptr() if tensor.numel() and not tensor.is_meta else -id(tensor)
                if storage not in seen:
                    seen.add(storage)
                    tensors[f"{key}.{name}"] = tensor
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on training: all parameters and buffers, reparametrisations included."""
        return {f"{key}.{name}": t for key, piece in self.pieces.items() for name, t in piece.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave, strictly.

        Raises:
            FormatError: names or shapes differ; the message lists all of them.
            AdapterError: the adapter is merged, so new values would not reach the weights.
        """
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} is merged into the weights; unmerge() it before loading values.")
        with torch.no_grad(), gathered(self.parameters(), filled=True):
            self._load(tensors)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        wrong = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
        if missing or extra or wrong:
            raise FormatError(
                f"adapter {self.name!r}: missing {missing}, unexpected {extra}, wrong shape {sorted(wrong)}."
            )
        for name, tensor in own.items():
            fill(tensor, tensors[name])

    def save(self, path: str | Path, format: str = "native", **options: Any) -> Path:
        """Writes the adapter folder; it appears whole or not at all.

        Args:
            path: the folder to write. An adapter folder that is there is replaced.
            format: "native" or "peft".
            options: `keep_training_state=True` also stores reparametrisations, so that training can resume.
        """
        if format == "native":
            from inlay.formats import native

            return native.save(self, Path(path), **options)
        if format == "peft":
            from inlay.formats import peft

            with gathered(self.parameters()):
                if any(is_sharded(p) for p in self.parameters()) and not writes():
                    return Path(path)  # every process has gathered, one writes
                return peft.save(self, Path(path), **options)
        raise FormatError(f"format={format!r} is not known: {nearest(format, ['native', 'peft'])}")

    def merge(self, **options: Any) -> MergeReport:
        """Folds the adapter into the weights of the model: W ← W + ΔW. Options and errors: `inlay.merge.merge`."""
        from inlay import merge

        return merge.merge(self, **options)

    def unmerge(self) -> Adapter:
        """Takes a merged adapter out again; every bit of the weights is as before."""
        from inlay import merge

        merge.unmerge(self)
        return self

    def detach(self) -> None:
        """Removes the adapter from its model."""
        detach(self.model, self.name)

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.method!r})"

    def __str__(self) -> str:
        from inlay.describe import describe

        return describe(self)


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    head: Literal["auto"] | str | Sequence[str] | None = "auto",
    example: Mapping[str, Any] | None = None,
) -> Adapter:
    """Sets a method into a model. The model stays the same object; its own parameters are frozen.

    The new adapter becomes the active one; others stay attached and untouched (`use` chooses among them).

    Args:
        model: any transformers model, or any module for sites given as module paths.
        method: what to learn and where, for example `LoRA(rank=16, sites="linear")`.
        name: how to refer to this adapter; letters, digits, `-`, `_`.
        head: module paths to train as a whole and keep with the adapter. "auto" takes the task head where the model
            has one that is new for each task (classification, tagging, question answering); None takes none.
        example: keyword arguments of one forward pass, for a model that takes something other than token ids.

    Returns:
        The handle of the adapter.

    Raises:
        SiteError: a selector matches nothing. MethodError: the method cannot work on this model.
        AdapterError: the name is taken. AttachmentError: the model is sharded or wrapped already.
    """
    if not isinstance(model, nn.Module):
        raise AttachmentError(f"attach() takes a torch.nn.Module to put the method into, not {type(model).__name__}.")
    if not isinstance(method, Method):
        raise MethodError(f"attach() takes a method such as inlay.LoRA(rank=8), not {type(method).__name__}.")
    state = state_of(model)
    _check_name(name, state)
    _refuse_sharded(model)
    found = anatomy(model, example)
    built = build(model, method, found, heads(found, head))
    fresh = state is None
    if state is None:
        state = State()
        model.__dict__[STATE] = state
    adapter = Adapter(name, method, model)
    try:
        _insert(model, state, adapter, built, found.reruns)
        if not any(True for _ in adapter.parameters()):
            raise MethodError(
                f"{method!r} trains nothing on {found.model}: it has no parameters and there is no new task head."
            )
        if fresh:
            _freeze(model, state)
        keep_adapters(model)
        state.adapters[name] = adapter
        state.activate(everyone((name,)))
    except BaseException:
        state.adapters.pop(name, None)
        _remove(model, state, name)
        raise
    return adapter


def detach(model: nn.Module, name: str | None = None) -> None:
    """Removes one adapter, or all. After the last one the model is exactly what it was before the first.

    Raises:
        AdapterError: there is no such adapter. AttachmentError: the model was wrapped since.
    """
    state = require(model)
    names = list(reversed(state.adapters)) if name is None else [name]
    for each in names:
        known_name(state, each)
        if state.adapters[each].merged:
            state.adapters[each].unmerge()
        _refuse_wrapped(state)
        del state.adapters[each]
        groups = tuple(Group(tuple(n for n in g.names if n != each), g.rows) for g in state.groups)
        _remove(model, state, each, groups)


def load(model: nn.Module, path: str | Path, name: str | None = None, **options: Any) -> Adapter:
    """Attaches an adapter from a folder: inlay's own or PEFT's, told apart by what is in it.

    Args:
        model: the base model it was trained on.
        path: the folder.
        name: how to call it here; by default the name it was saved under.
        options: `allow_other_base=True` accepts a base whose fingerprint differs.

    Raises:
        FormatError: the folder is incomplete, damaged, from a newer version, or belongs to another base.
    """
    from inlay.formats import read

    return read(model, Path(path), name, **options)


def _check_name(name: str, state: State | None) -> None:
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise AdapterError(
            f"adapter name {name!r} must be letters, digits, '-' and '_', so that it can be part of a tensor name."
        )
    if state is not None and name in state.adapters:
        raise AdapterError(f"an adapter {name!r} is attached already; choose another name or detach it first.")


def _refuse_sharded(model: nn.Module) -> None:
    # Without the pieces of the adapters that are there already: each attach costs what the first did.
    for path, module in modules_of(model):
        if type(module).__name__ in ("FullyShardedDataParallel", "DistributedDataParallel"):
            raise AttachmentError(
                f"{path or 'the model'} is wrapped in {type(module).__name__} already: its ranks would not share the "
                "adapter's gradients. Attach first, then wrap."
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                raise AttachmentError(
                    f"{path}.{name} is sharded already (FSDP2 or ZeRO 3): an adapter attached now would not be, and "
                    "its gradient would differ between the processes without a word. Attach first, then call "
                    "fully_shard or deepspeed.initialize."
                )


def _insert(model: nn.Module, state: State, adapter: Adapter, built: Built, reruns: tuple[str, ...]) -> None:
    modules = dict(modules_of(model))
    for key, piece, site in built:
        state.hosts |= insert(modules, adapter.name, key, piece, site)
        adapter.pieces[f"{site.leave}.{key}"] = piece
        adapter.sites.append(site)
        adapter.paths.append(site.leave)
        if piece.needs_padding:
            piece.__dict__["padding"] = state.padding
            tell_padding(model, state.padding)
    if any(site.kind == "attention" for site in adapter.sites):
        from inlay.hosts.attention import enable

        enable(model)
    for path in reruns:
        state.hosts[path] = surround(modules, path, adapter.name, adapter.paths)
    if reruns or any(isinstance(piece, VirtualTokens) for piece in adapter.pieces.values()):
        hosts_rows(model)


def _freeze(model: nn.Module, state: State) -> None:
    ours = {id(p) for module in state.hosts.values() for p in _pieces_of(module)}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            state.frozen.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)


def _pieces_of(module: nn.Module) -> Iterator[nn.Parameter]:
    bag = module._modules.get("inlay")
    return bag.parameters() if bag is not None else iter(())


def _refuse_wrapped(state: State) -> None:
    """Checked before anything is removed, so that a refusal changes nothing."""
    for path, module in state.hosts.items():
        if not is_intact(module):
            raise AttachmentError(
                f"{path} is no longer the module that inlay adapted (its class is {type(module).__name__}). Undo what "
                "was done to it after attaching, then detach."
            )


def _remove(model: nn.Module, state: State, name: str, groups: tuple[Group, ...] | None = None) -> None:
    for path, module in list(state.hosts.items()):
        remove(module, name)
        if not isinstance(module, Host):
            del state.hosts[path]
    if state.adapters:
        state.activate(groups if groups is not None else state.groups, state.batch)
        return
    for parameter, requires_grad in state.frozen:
        parameter.requires_grad_(requires_grad)
    ModelHost.leave(model)
    model.__dict__.pop(STATE, None)


__all__ = ["Adapter", "State", "Use", "adapters", "attach", "detach", "load", "state_of", "use"]
