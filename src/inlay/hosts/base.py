"""Putting pieces into modules and taking them out again, without a trace.

A hosted module keeps its identity, its parameters, its children and their names; only its class changes, to a subclass
made for it, and it gains one child, `inlay`, that holds the pieces. That survives deepcopy, pickle and `torch.compile`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.anatomy.base import Site
from inlay.errors import AttachmentError
from inlay.methods.base import Piece
from inlay.padding import Padding
from inlay.route import Group


class Pieces(nn.Module):
    """A bag of modules by name. Unlike `nn.ModuleDict` it takes any name without a dot ("train", "keys", ...)."""

    def forward(self, x: Any) -> Any:
        """x: a hosted `nn.Sequential` calls its children in turn, and this is one of them."""
        return x

    def put(self, name: str, module: nn.Module) -> None:
        """Adds or replaces one."""
        self._modules[name] = module

    def drop(self, name: str) -> None:
        """Removes one, if it is there."""
        self._modules.pop(name, None)

    def get(self, name: str) -> nn.Module | None:
        """One by name."""
        return self._modules.get(name)

    def __len__(self) -> int:
        return len(self._modules)


@dataclass(eq=False)
class Span:
    """Carries the input of a span from the module that enters it to the module that leaves it."""

    site: Site
    x: Tensor | None = None

    def take(self) -> Tensor:
        """The input seen since the last call; it is not kept afterwards."""
        x, self.x = self.x, None
        if x is None:
            raise AttachmentError(
                f"{self.site.leave} ran, but {self.site.enter}, where the span {self.site.name!r} begins, did not. "
                "Name both ends in the sites, or choose a site within one module."
            )
        return x


@dataclass(eq=False)
class Placed:
    """One piece at its site.

    Attributes:
        merged: it is folded into the weights and must not act a second time.
        stale: it is relative to the frozen weights, and another adapter was merged into them since it was built.
    """

    piece: Piece
    site: Site
    span: Span | None = None
    merged: bool = False
    stale: bool = False


@dataclass(eq=False)
class Hosted:
    """What a hosted module knows: path, its config, pieces by adapter, the spans it opens, the plan for this route.

    `proven` is set where a run on a few tokens showed that its own code can be followed, `pads` where a piece was
    placed that needs to know the padding. `around` names the adapters of a model whose blocks this module runs again
    in its backward pass, and says of each whether it has pieces in these blocks.
    """

    path: str
    config: Any = None
    placed: dict[str, list[Placed]] = field(default_factory=dict)
    opens: dict[str, list[Span]] = field(default_factory=dict)
    plan: Any = None
    proven: bool = False
    pads: bool = False
    around: dict[str, bool] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether no adapter needs this host any more."""
        return not (any(self.placed.values()) or any(self.opens.values()) or self.around)


class Host:
    """A mixin that is put before a module's own class. Never instantiated by itself."""

    host: ClassVar[type[Host]]
    base: ClassVar[type[nn.Module]]
    _inlay: Hosted

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).host, type(self).base), self.__dict__.copy()

    @classmethod
    def make_plan(cls, state: Hosted, groups: tuple[Group, ...]) -> Any:
        """What `forward` must do for these groups of rows, or None where it need do nothing."""
        raise NotImplementedError


_classes: dict[tuple[type[Host], type[nn.Module]], type[nn.Module]] = {}


def hosted_class(host: type[Host], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that hosts pieces; made once, and named as `base` for look-ups by name."""
    key = host, base
    if key not in _classes:
        body = {"host": host, "base": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[key] = type(base.__name__, (host, base), body)
    return _classes[key]


def _rebuild(host: type[Host], base: type[nn.Module]) -> nn.Module:
    cls = hosted_class(host, base)
    return cls.__new__(cls)


def adopt(module: nn.Module, host: type[Host], path: str) -> Hosted:
    """Makes `module` a host of the given kind; does nothing where it is one already.

    Raises:
        AttachmentError: the module already hosts pieces of another kind.
    """
    if isinstance(module, Host):
        if not issubclass(type(module).host, host):
            raise AttachmentError(
                f"{path} already hosts pieces as {type(module).host.__name__}, not as {host.__name__}."
            )
        return module._inlay
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise AttachmentError(
            f"{path}: its forward was replaced on the module itself, which would pass by the adapter without a word. "
            "Undo that (another library's patch), attach, and apply it again."
        )
    module.__class__ = hosted_class(host, type(module))  # type: ignore[assignment, unused-ignore]
    follow_dispatch(module)
    module._modules["inlay"] = Pieces()
    state = Hosted(path, config=module.__dict__.get("config"))
    module.__dict__["_inlay"] = state
    return state


def follow_dispatch(module: nn.Module) -> None:
    """accelerate's device placement calls the forward it once bound; it must be that of the module's class now."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def is_intact(module: nn.Module) -> bool:
    """Whether a hosted module still has the class it was given, so that release gives back what was there before."""
    cls = type(module)
    return isinstance(module, Host) and _classes.get((cls.host, cls.base)) is cls  # type: ignore[attr-defined]


def release(module: nn.Module) -> None:
    """Gives a module its own class back.

    Raises:
        AttachmentError: something changed the module's class after it was adopted.
    """
    if not isinstance(module, Host):
        return
    cls = type(module)
    if not is_intact(module):
        raise AttachmentError(
            f"{module._inlay.path} was changed again after an adapter was attached (class {cls.__name__}). Undo that "
            "first (parametrizations, fully_shard, another library's wrapper), then detach."
        )
    module.__class__ = cls.base  # type: ignore[assignment, unused-ignore]
    follow_dispatch(module)
    del module._modules["inlay"]
    del module.__dict__["_inlay"]


def pristine_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module without pieces, of its own class. `memo` keeps tied parameters tied."""
    cls = type(module).base if isinstance(module, Host) else type(module)
    clone = cls.__new__(cls)
    state = {k: v for k, v in module.__dict__.items() if k != "_inlay"}
    state["_modules"] = {k: v for k, v in module._modules.items() if k != "inlay"}
    clone.__dict__.update(copy.deepcopy(state, memo))
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        clone.__dict__[hooks] = type(module.__dict__[hooks])()
    return clone


def place(module: nn.Module, adapter: str, key: str, placed: Placed) -> None:
    """Registers a piece as `<module>.inlay.<adapter>.<key>`."""
    host = module
    assert isinstance(host, Host)
    bag = module._modules["inlay"]
    assert isinstance(bag, Pieces)
    own = bag.get(adapter)
    if own is None:
        own = Pieces()
        bag.put(adapter, own)
    assert isinstance(own, Pieces)
    own.put(key, placed.piece)
    own.train(module.training)
    host._inlay.placed.setdefault(adapter, []).append(placed)
    host._inlay.pads = host._inlay.pads or placed.piece.needs_padding


def remove(module: nn.Module, adapter: str) -> None:
    """Takes all pieces and spans of an adapter out of a module, and releases it when none is left."""
    if not isinstance(module, Host):
        return
    module._inlay.placed.pop(adapter, None)
    module._inlay.opens.pop(adapter, None)
    module._inlay.around.pop(adapter, None)
    bag = module._modules["inlay"]
    assert isinstance(bag, Pieces)
    bag.drop(adapter)
    if module._inlay.empty:
        assert isinstance(module, nn.Module)
        release(module)


def padding_of(state: Hosted) -> Padding | None:
    """The model's padding, where a piece at this module needs to know it."""
    if not state.pads:
        return None
    return next((p.piece.padding for pieces in state.placed.values() for p in pieces if p.piece.needs_padding), None)


def cast_like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in the dtype that activations like x have."""
    return tensor if tensor.dtype == x.dtype or not torch.is_floating_point(x) else tensor.to(x.dtype)
