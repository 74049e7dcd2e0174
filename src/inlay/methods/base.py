"""The contracts between a method, the places it goes to, and the hosts that put it there.

A `Method` is the frozen configuration that a user writes. For each `Site` it selects it builds one piece: an
`nn.Module` that obeys one of five contracts. A method never sees the model, and a host never knows a method's name.

Legend: B batch, T tokens, I / O features entering / leaving a site, H heads, P prefix length, D head size.
"""

from __future__ import annotations

import abc
import copy
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Columns, Site
from inlay.complaints import wrong_settings
from inlay.errors import MergeError, MethodError, nearest
from inlay.route import Rows

if TYPE_CHECKING:
    from inlay.padding import Padding


class Piece(nn.Module):
    """What all five contracts share: how a piece is stored.

    Parameters are fp32 masters; a piece computes in the dtype of the activations it is given.

    Attributes:
        needs_frozen: Δ is relative to the frozen module's own output, so the host passes that as y even where another
            adapter acted before. Other deltas see y as the adapters before them left it.
        needs_padding: the piece averages over tokens, so `padding` says which positions of its rows are real.
    """

    needs_frozen: ClassVar[bool] = False
    needs_padding: ClassVar[bool] = False
    padding: Padding

    def begin(self, total_steps: int) -> None:
        """Called once before the first optimizer step of a run, and again when it is resumed.

        For pieces with a schedule; a trainer calls it on every piece of the adapter, a bare loop need not where the
        method was told its number of steps.

        Args:
            total_steps: optimizer steps of the whole run.
        """
        del total_steps

    def learning_rates(self) -> dict[str, float]:
        """Learning rates that the method fixes whatever that of the run, by parameter name. Most fix none."""
        return {}

    def undecayed(self) -> set[str]:
        """Names of the parameters that weight decay would work against; by default those with a rate of their own."""
        return set(self.learning_rates())

    def stored(self) -> dict[str, Tensor]:
        """The tensors that an adapter folder keeps; by default the state dict."""
        return dict(self.state_dict())

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave."""
        self.load_state_dict(tensors)

    def stored_spec(self) -> dict[str, torch.Size]:
        """Names and shapes that `load_stored` expects."""
        return {name: tensor.shape for name, tensor in self.stored().items()}


class Delta(Piece, abc.ABC):
    """Δ(x, y): what is added to y_BTO, the output of a frozen span, given its input x_BTI.

    Written for any leading dimensions ([B, T, I] or [B*T, I]), so token axis -2 and feature axis -1 only.
    """

    @abc.abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Δ with the shape and dtype of y."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y + Δ(x, y). A method may fuse the sum; the result must equal the plain form."""
        return y + self(x, y)  # type: ignore[no-any-return]

    @classmethod
    def together(cls, deltas: Sequence[Delta], index: Sequence[int]) -> Rowwise | None:
        """(x, y) -> y with each row's own Δ added in fewer steps than a loop over the pieces, if the class has that.

        Args:
            deltas: pieces of this class at one site.
            index: for each row of the batch the number of its piece, or -1.
        """
        del deltas, index
        return None

    @classmethod
    def fused(
        cls,
        deltas: Sequence[Delta],
        columns: Sequence[Columns | None],
        base: type[nn.Module],
        rows: Sequence[Rows] | None = None,
    ) -> Fused | None:
        """(module, x) -> its output with all Δ added, in one step of autograd, if the class has that.

        Args:
            deltas: pieces of this class that act on what leaves one module, and read what enters it.
            columns: the ranges of features that each writes, or None for all.
            base: the class of the frozen module.
            rows: the rows of the batch that each acts on, neighbours of each other; None for all rows.
        """
        del deltas, columns, base, rows
        return None

    def weight_delta(self) -> Tensor:
        """ΔW of shape (out, in) where Δ is linear in x.

        Raises:
            MergeError: this piece is not linear in its input.
        """
        raise MergeError(
            f"{type(self).__name__} is not linear in its input, so it cannot be folded into a weight. Keep it attached."
        )

    def bias_delta(self) -> Tensor | None:
        """What is added to the bias of the module when this piece is merged, if anything."""
        return None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The map y = W x + b with Δ in it: W of shape (out, in) and b of shape (out,), as earlier pieces left them.

        A piece whose Δ depends on y (a rescaling) overrides this instead of `weight_delta`.

        Raises:
            MergeError: this piece is not linear in its input.
        """
        delta, shift = self.weight_delta(), self.bias_delta()
        weight = weight + delta.to(weight)
        return weight, bias if shift is None else shift.to(weight) if bias is None else bias + shift.to(weight)

    def fold_input(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same for a piece that acts on what enters the module: W (x + Δ(x)) + b.

        Raises:
            MergeError: this piece is not linear in its input.
        """
        delta, shift = self.weight_delta(), self.bias_delta()
        if shift is not None:
            moved = weight @ shift.to(weight)
            bias = moved if bias is None else bias + moved
        return weight + weight @ delta.to(weight), bias


class Fused(Protocol):
    """A frozen module and its pieces in one step; equal to the pieces added one by one."""

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """The output for x, or None where it must be computed piece by piece."""


class Rowwise(nn.Module, abc.ABC):
    """Pieces of one kind at one site, each row of the batch with its own, in one step.

    Attributes:
        fresh: y is made for this call alone, so that without gradients the sum may be written into it.
    """

    fresh: bool = False

    @property
    @abc.abstractmethod
    def loops(self) -> bool:
        """Whether the pieces must be called one by one after all just now (each row group has dropout of its own)."""

    @abc.abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y with each row's Δ added; the entries of a row stand together in x and y."""


class Replacement(Piece, abc.ABC):
    """Used instead of the frozen module: a task head, a trained norm, a module under full fine-tuning."""

    @abc.abstractmethod
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module returns for x and whatever else it is called with."""


class ExtraKV(Piece, abc.ABC):
    """More keys and values for an attention module: prefix tuning and its relatives."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """k_BHPD, v_BHPD (B may be 1 where the rows share them) for the attention input x_BTI.

        A third tensor, g_BT1, multiplies keys and values by a number for each query; a gate for each row needs none.
        """


class HeadDelta(Piece, abc.ABC):
    """Added to the output of each attention head, given its query: the multi-head parallel adapter."""

    @abc.abstractmethod
    def forward(self, q: Tensor) -> Tensor:
        """Δ_BHTD for the queries q_BHTD as the model's scores use them: projected, rotated, scaled."""


class VirtualTokens(Piece, abc.ABC):
    """Rows of a virtual vocabulary, served behind the real one: prompt tuning, P-tuning.

    Attributes:
        length: P, the number of virtual tokens.
        places: (at, count) of each run of them, for rows of ordinary ids: after `at` real tokens, or for at < 0 before
            the last ~at of them. None where only ids that hold the virtual tokens can say.
    """

    length: int
    places: tuple[tuple[int, int], ...] | None = ()

    @abc.abstractmethod
    def forward(self) -> Tensor:
        """e_PI, one embedding per virtual token."""


class Frozen:
    """A read-only view on the frozen module at a site, for methods that start from its weights."""

    def __init__(self, module: nn.Module, memo: dict[int, Any], path: str = "") -> None:
        self.path = path
        self._module = module
        self._memo = memo

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are."""
        tensor = next(iter(self._module.parameters()), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the module's parameters compute in."""
        floating = (p.dtype for p in self._module.parameters(recurse=False) if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def bias(self) -> Tensor | None:
        """The module's bias, if it has one."""
        bias = getattr(self._module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def type_name(self) -> str:
        """The class name of the module."""
        return type(self._module).__name__

    @property
    def output_scale(self) -> float:
        """What a scaled embedding multiplies its rows by; 1 everywhere else."""
        scale = getattr(self._module, "scalar_embed_scale", getattr(self._module, "embed_scale", 1.0))
        return float(scale)

    @property
    def version(self) -> tuple[object, ...]:
        """Equal as long as the weight was neither replaced nor written to: the key of whatever is computed from it."""
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight.data_ptr(), weight._version, weight.device, weight.dtype

    def weight(self) -> Tensor:
        """The dense weight as (out, in), dequantised where it is stored quantised."""
        from inlay.quant.bridge import weight_of

        return weight_of(self._module)

    def keep(self) -> Frozen:
        """A view for a piece that needs the module for as long as it lives; copied and pickled with the model."""
        return Frozen(self._module, {}, self.path)

    def embed(self, ids: Tensor) -> Tensor:
        """What an embedding gives for these ids, scaled as the model scales it; without pieces."""
        with torch.no_grad():
            return self.run(ids.to(self.device))  # type: ignore[no-any-return]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself gives, without pieces."""
        from inlay.hosts.base import Host

        cls: Any = type(self._module).base if isinstance(self._module, Host) else type(self._module)
        return cls.forward(self._module, *args, **kwargs)

    def copy(self) -> nn.Module:
        """A trainable fp32 copy of the module. Tied parameters stay tied among the copies of one adapter."""
        from inlay.hosts.base import pristine_copy

        clone = pristine_copy(self._module, self._memo)
        for parameter in clone.parameters():
            if not parameter.is_floating_point():
                raise MethodError(
                    f"{self.path or type(self._module).__name__} is stored quantised ({parameter.dtype}), so it cannot "
                    "be trained itself. Choose a method that adds to it (LoRA, Bottleneck, ...)."
                )
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return clone


class Method(BaseModel, abc.ABC):
    """The frozen configuration of one method; `+` mixes methods into one adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise MethodError(wrong_settings(type(self), error)) from None

    tag: ClassVar[str] = ""
    citation: ClassVar[str] = ""

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is made of; itself unless it is a mix."""
        return (self,)

    @property
    def title(self) -> str:
        """What it is called in tables and messages: the name that the user wrote, `MAM`, or `LoRA+Prefix` for a mix."""
        return type(self).__name__

    def select(self, anatomy: Anatomy) -> list[Site]:
        """The sites this method goes to in a model."""
        raise NotImplementedError(f"{type(self).__name__} selects no sites")

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Piece:
        """The piece for one site."""
        raise NotImplementedError(f"{type(self).__name__} builds no pieces")

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        """A module that the pieces of all sites use together; kept by the first, borrowed by the others."""
        del sites
        return None

    def finish(self, pieces: Sequence[tuple[Site, Piece]]) -> None:
        """Called once with all pieces of this part, for methods that must see them together."""
        del pieces

    def __add__(self, other: Method) -> Mix:
        if not isinstance(other, Method):
            return NotImplemented
        sides = (side.methods if isinstance(side, Mix) else (side,) for side in (self, other))
        return Mix(methods=tuple(method for side in sides for method in side))

    @classmethod
    def spec_name(cls) -> str:
        """The lower-case name used in files and on the command line."""
        return cls.__name__.lower()

    def spec(self) -> dict[str, Any]:
        """The configuration as JSON-compatible values, with the method's name."""
        return {"method": self.spec_name(), **self.model_dump(mode="json")}


class Mix(Method):
    """Several methods on one model as one adapter: `LoRA(...) + Prefix(...)`."""

    methods: tuple[Any, ...]

    @property
    def parts(self) -> tuple[Method, ...]:
        return tuple(part for method in self.methods for part in method.parts)

    @property
    def title(self) -> str:
        return "+".join(method.title for method in self.methods)

    def spec(self) -> dict[str, Any]:
        return {"method": "mix", "methods": [m.spec() for m in self.methods]}

    def __repr__(self) -> str:
        return " + ".join(repr(m) for m in self.methods)


def methods() -> dict[str, type[Method]]:
    """All methods by their lower-case name, found by importing every file of this folder."""
    import inlay.methods as package

    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"inlay.methods.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Method) and cls.__module__ == module.__name__ and cls.citation:
                found[cls.spec_name()] = cls
    return dict(sorted(found.items()))


def from_spec(spec: dict[str, Any]) -> Method:
    """The method that `Method.spec` described.

    Raises:
        MethodError: the name is not a method, or its settings are not what that method takes.
    """
    settings = copy.deepcopy(spec)
    name = str(settings.pop("method", ""))
    if name == "mix":
        return Mix(methods=tuple(from_spec(m) for m in settings.get("methods", ())))
    known = methods()
    if name not in known:
        raise MethodError(f"method {name!r} is not known: {nearest(name, known)}")
    return known[name](**settings)


def citation(what: object) -> str:
    """The BibTeX of everything that an adapter or a method uses, each entry once."""
    method = what if isinstance(what, Method) else getattr(what, "method", None)
    if not isinstance(method, Method):
        raise MethodError(f"citation() takes a method or an adapter, not {type(what).__name__}.")
    sources: Iterable[Method] = (method, *getattr(method, "methods", ()), *method.parts)
    entries: dict[str, None] = {}
    for source in sources:
        if source.citation:
            entries.setdefault(inspect.cleandoc(source.citation))
    return "\n\n".join(entries)
