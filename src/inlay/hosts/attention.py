"""The host on an attention module: more keys and values, and deltas on the heads' output.

transformers' attention modules fetch their attention function by the name in `self.config`. A hosted module that has
something to do reads another name there, `inlay`, and so calls `inlay.hosts.attend`, which calls the function that the
config really names. Nothing else sees that name: masks are built, caches filled and names compared outside of the
module as if no adapter were there, rows without extra keys keep their bits, a later `set_attn_implementation` is
obeyed, and there is nothing to put back. A function that cannot take the keys is refused by name, never bypassed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any, ClassVar

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from inlay.anatomy.tree import modules_of
from inlay.errors import AttachmentError
from inlay.hosts.attend import NAME, SERVED, Function, Plan, attend, former
from inlay.hosts.base import Host
from inlay.hosts.keys import KeysHost, input_of


class Alias(str):
    """The name `inlay` to whoever looks the function up, and equal to the former name to whoever compares it.

    So a module that compares the name (sparse attention does) goes the way it would go without inlay. `torch.compile`
    does not take such a string, so modules that do not compare get a plain one.
    """

    former: str

    def __new__(cls, former: str) -> Alias:
        alias = super().__new__(cls, NAME)
        alias.former = former
        return alias

    def __eq__(self, other: object) -> bool:
        return other == self.former or str.__eq__(self, other)

    __hash__ = str.__hash__


ALIASES = {name: Alias(name) for name in SERVED}


class ModuleConfig:
    """The config as a module with active pieces reads it: all as it is, but the name of the attention function."""

    def __init__(self, real: Any, name: str) -> None:
        self.__dict__["_real"] = real
        self.__dict__["_attn_implementation"] = name

    def __getattr__(self, name: str) -> Any:
        if name == "_real":
            raise AttributeError(name)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


class AttentionHost(KeysHost):
    """Serves `ExtraKV` and `HeadDelta` pieces at modules that call transformers' attention function.

    Attributes:
        functions: the attention interface that the module's class uses.
        eager: the attention function beside that class, which the name "eager" stands for.
        compared: the words in the methods that read the function's name, among them those they compare it with.
    """

    functions: ClassVar[Any] = None
    eager: ClassVar[Function | None] = None
    compared: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "base" not in cls.__dict__:
            return
        words: set[str] = set()
        for function in _readers(cls.base):
            names, used = function.__globals__, function.__code__.co_names
            words |= _words(function.__code__.co_consts)
            found = next((names[n] for n in used if isinstance(names.get(n), AttentionInterface)), None)
            if found is not None and cls.functions is None:
                eager = next((n for n in used if n.endswith("eager_attention_forward")), "eager_attention_forward")
                cls.functions = found
                cls.eager = staticmethod(names[eager]) if eager in names else None
        cls.compared = frozenset(words)

    @property
    def config(self) -> Any:
        """The module's config; while pieces are at work it names `attend` as the attention function."""
        real = self._inlay.config  # torch 2.11 compiles a look into `__dict__` as a call of this property
        if self._inlay.plan is None:
            return real
        name = real._attn_implementation
        # GPT-2 compares the name for one option only.
        compares = name in self.compared and self.__dict__.get("reorder_and_upcast_attn", True)
        return ModuleConfig(real, ALIASES.get(name, NAME) if compares else NAME)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = self._inlay.config = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen module's result with the active pieces applied."""
        plan = self._inlay.plan
        if not isinstance(plan, Plan):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        plan.x = input_of(args, kwargs)
        plan.calls = 0
        try:
            result = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            plan.x = None
        if plan.calls == 0:
            raise AttachmentError(
                f"{self._inlay.path} did not call transformers' attention function in this forward pass, so its extra "
                "keys would have been ignored. Use methods without prefixes there (LoRA, Bottleneck, ...)."
            )
        return result


def _readers(base: type[nn.Module]) -> Iterator[FunctionType]:
    """The methods of a class that read the name of the attention function."""
    for cls in base.__mro__:
        for member in vars(cls).values():
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and "_attn_implementation" in function.__code__.co_names:
                yield function


def _words(constants: Sequence[Any]) -> set[str]:
    inner = [s for c in constants if isinstance(c, tuple | frozenset) for s in c]
    return {c for c in (*constants, *inner) if isinstance(c, str)}


def host_for(module: nn.Module) -> type[KeysHost]:
    """The host for an attention module: does it ask for its attention function, or compute by itself?"""
    if isinstance(module, Host):
        kind = type(module).host
        return kind if issubclass(kind, KeysHost) else AttentionHost
    if "config" in module.__dict__ and any(_interfaces(type(module))):
        return AttentionHost
    from inlay.hosts.softmax import SoftmaxHost

    return SoftmaxHost


def _interfaces(base: type[nn.Module]) -> Iterator[AttentionInterface]:
    """The attention interfaces that the methods of a class ask for their function."""
    for function in _readers(base):
        for name in function.__code__.co_names:
            found = function.__globals__.get(name)
            if isinstance(found, AttentionInterface):
                yield found


def enable(model: nn.Module) -> None:
    """Makes sure that every hosted attention of a model can take extra keys.

    Raises:
        AttachmentError: one of them cannot; the message says why and what to do.
    """
    from inlay.hosts.softmax import prove

    for _, module in modules_of(model):
        if isinstance(module, AttentionHost):
            former(module)
    prove(model)


def build_mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask builder of the function that a config really names, for modules that build masks themselves."""
    real = config._real if isinstance(config, ModuleConfig) else config
    return ALL_MASK_ATTENTION_FUNCTIONS[real._attn_implementation](*args, config=real, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, build_mask)
