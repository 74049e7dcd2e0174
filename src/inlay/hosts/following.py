"""More keys for an attention that a module computes by itself: they follow its scores through its own code.

While such a module runs, every torch function it calls is seen. The product of queries and keys is where the scores of
the extra keys begin: s_P = q P_k^T. From there on they follow the module's scores. What acts on all scores alike
(scale, cast, soft cap, reshape) acts on them too; what speaks of single keys (position bias, mask) leaves them as they
are, so that every query sees them without bias. The softmax is taken over both together, and at the product with the
values p_P P_v is added. Only functions whose effect is known are followed; any other is refused by name.

Legend: B batch, G further batch axes, H heads, T queries, K keys, P extra keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay.anatomy.base import Heads
from inlay.errors import AttachmentError
from inlay.hosts.extras import Extras
from inlay.hosts.products import NAMES, Product, laid_out, read, standard

ALIKE = frozenset((
    "float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone", "tanh", "dropout",
    "clamp", "clip", "clamp_min", "clamp_max", "nan_to_num",
))  # fmt: skip
"""Functions of each score for itself."""

LIKE = frozenset(("to", "type_as", "view_as", "expand_as"))
"""Functions whose second argument only tells a dtype or a shape."""

SHAPED = frozenset((
    "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "expand", "expand_as",
))  # fmt: skip
TURNED = frozenset(("transpose", "swapaxes", "swapdims", "permute"))
SUMS = frozenset(("add", "sub", "subtract"))
SCALES = frozenset(("mul", "multiply", "div", "divide", "true_divide", "truediv"))
MASKS = frozenset(("masked_fill", "where"))
BOUNDS = frozenset(("maximum", "minimum", "max", "min"))
ASKS = frozenset((
    "amax", "amin", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_full", "new_ones",
))  # fmt: skip
"""Functions whose result is no longer a score for each key."""

WAYOUT = "Use methods without prefixes there (LoRA, Bottleneck, ...)."


@dataclass(frozen=True, eq=False)
class Scores:
    """What follows one tensor of scores.

    Attributes:
        extra: the same for the extra keys: equal in all axes but the last, which is P instead of K.
        keys: K.
        scale: what q kᵀ has been multiplied by; None where that is not one number.
        soft: whether the softmax was taken.
    """

    extra: Tensor
    keys: int
    scale: float | Tensor | None
    soft: bool = False


class Following(TorchFunctionMode):
    """Sees the functions that a hosted module calls during one forward pass.

    Attributes:
        served: how many attentions got the extra keys.
    """

    def __init__(self, path: str, heads: Heads, extras: Extras) -> None:
        super().__init__()
        self.path, self.heads, self.extras = path, heads, extras
        self.served = 0
        self._known: dict[int, tuple[Tensor, Scores]] = {}
        self._scaled: dict[int, tuple[Tensor, float | Tensor]] = {}
        self._query: Tensor | None = None
        self._trains = torch.is_grad_enabled()

    def finish(self) -> None:
        """Refuses a forward pass in which the extra keys would have been ignored.

        Raises:
            AttachmentError: scores were computed that no softmax and no values took, or none at all.
        """
        if self._query is not None or not self.served:
            what = "no product of all queries and keys was seen (it may go by blocks or windows)"
            what = what if self._query is None else "its scores did not reach the values"
            raise AttachmentError(
                f"{self.path} computes its attention by itself, and {what}, so extra keys would have been ignored. "
                + WAYOUT
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in NAMES:
            return self._product(func, name, args, kwargs)
        if name == "scaled_dot_product_attention" and self._query is None:
            return self._attention(func, args, kwargs)
        own = self._followed(args[:1] if name in LIKE else args, kwargs)
        if not own:
            if name == "softmax":
                self._refuse_beside(args, kwargs)
            result = func(*args, **kwargs)
            self._note_scale(_plain(name), args, result)
            return result
        if len(own) > 1:
            raise self._refusal(name)
        if name == "softmax":
            return self._softmax(func, own[0], args, kwargs)
        result = func(*args, **kwargs)
        follows = isinstance(result, Tensor) and result.is_floating_point()
        if follows and name not in ASKS and not (name in BOUNDS and len(args) == 1):
            self._know(result, self._next(func, name, own[0], result, args, kwargs))
        elif isinstance(result, tuple | list) and name not in BOUNDS and any(isinstance(r, Tensor) for r in result):
            raise self._refusal(name)
        return result

    def _know(self, tensor: Tensor, scores: Scores) -> None:
        self._known[id(tensor)] = tensor, scores

    def _of(self, value: Any) -> Scores | None:
        return self._known[id(value)][1] if id(value) in self._known else None

    def _followed(self, args: Any, kwargs: Any) -> list[Tensor]:
        given = [*args, *kwargs.values()]
        given += [i for g in given if isinstance(g, tuple | list) for i in g]
        return list({id(g): g for g in given if id(g) in self._known}.values())

    def _refusal(self, name: str) -> AttachmentError:
        return AttachmentError(
            f"{self.path} computes its attention by itself and passes the scores to {name!r}, through which inlay "
            f"cannot follow with extra keys. {WAYOUT}"
        )

    def _product(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        product, own = read(name, args, kwargs), self._followed(args, kwargs)
        if own:
            if product is None or len(own) > 1:
                raise self._refusal(name)
            return self._values(product if own[0] is product.left else product.swapped, func(*args, **kwargs), name)
        result = func(*args, **kwargs)
        if self._query is None and product is not None and self._are_scores(product):
            self._begin(product, result)
        return result

    def _are_scores(self, product: Product) -> bool:
        """Whether a product is that of queries and keys: heads of them, of the size of a key, and no weights."""
        if isinstance(product.left, nn.Parameter) or isinstance(product.right, nn.Parameter):
            return False
        return product.size("i") == self.heads.key_size and product.heads(self.extras.batch) == self.heads.query

    def _begin(self, product: Product, result: Tensor) -> None:
        batch = self.extras.batch
        q = standard(product.left, product.left_axes, batch)
        scale = self._scale_of(product.right)
        self.extras.see_keys(standard(product.right, product.right_axes, batch).mT, scale)
        extra = self.extras.scores(q)
        scale = scale * product.factor
        extra = laid_out(extra * scale, product.out_axes).to(result.dtype)
        self._query = q
        last = product.out_axes[-1] == "c"
        if not last:
            raise self._refusal("a product with the keys not last")
        self._know(result, Scores(extra, result.shape[-1], scale))

    def _note_scale(self, name: str, args: Any, result: Any) -> None:
        """Keys may be scaled before the product instead of the scores after it; a cache joins them to earlier ones."""
        first = args[0] if args else None
        if name == "cat" and isinstance(first, list | tuple):
            first = next((t for t in reversed(first) if id(t) in self._scaled), None)
        if isinstance(result, Tensor) and isinstance(first, Tensor):
            before = self._scaled.get(id(first))
            if name in SCALES and len(args) == 2 and _is_number(args[1]):
                by = args[1] if name in ("mul", "multiply") else 1 / args[1]
                self._scaled[id(result)] = result, by if before is None else before[1] * by
            elif before is not None and name in SHAPED | TURNED | {"cat", "contiguous", "to", "repeat"}:
                self._scaled[id(result)] = result, before[1]

    def _scale_of(self, keys: Tensor) -> float | Tensor:
        found = self._scaled.get(id(keys))
        return 1.0 if found is None else found[1]

    def _softmax(self, func: Any, own: Tensor, args: Any, kwargs: Any) -> Tensor:
        scores = self._of(own)
        assert scores is not None
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, own.ndim - 1) or scores.soft or own is not (args[0] if args else kwargs.get("input")):
            raise self._refusal("softmax over another axis than the keys")
        if self._trains and not torch.is_grad_enabled():
            raise self._refusal("an autograd function of its own, which would give them no gradient")
        if not scores.extra.shape[-1]:
            result: Tensor = func(*args, **kwargs)
            extra = scores.extra.to(result.dtype)
        else:
            seen = self.extras.hidden(scores.extra)
            both = torch.cat([seen.to(own.dtype), own], dim=-1)
            args, kwargs = _replaced(args, kwargs, own, both)
            whole: Tensor = func(*args, **kwargs)
            extra, result = whole.split([seen.shape[-1], scores.keys], dim=-1)
            result = result.contiguous()
        self._know(result, replace(scores, extra=extra, soft=True))
        return result

    def _refuse_beside(self, args: Any, kwargs: Any) -> None:
        """A softmax over other scores is a part of the attention that the extra keys would have no part in."""
        scores = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(scores, Tensor) and scores.ndim > 2 and dim in (-1, scores.ndim - 1):
            raise AttachmentError(
                f"{self.path} takes a softmax over other scores than those of all queries and keys (blocks, landmarks, "
                f"global tokens), which extra keys cannot enter. {WAYOUT}"
            )

    def _values(self, product: Product, result: Tensor, name: str) -> Tensor:
        scores = self._of(product.left)
        assert scores is not None
        if not scores.soft or self._query is None or product.left_axes[-1] != "i" or product.factor != 1:
            raise self._refusal(name)
        if product.right.shape[product.right_axes.index("c")] != self.heads.value_size:
            # Values of another stream (LiLT's layout): the extra keys have none there, that is, zeros.
            return result
        batch = self.extras.batch
        self.extras.see_values(standard(product.right, product.right_axes, batch))
        shares = standard(scores.extra, product.left_axes, batch)
        more = self.extras.outputs(shares, self._query, scores.scale)
        self.served += 1
        self._query = None
        self._known.clear()
        return result if more is None else result + laid_out(more, product.out_axes).to(result.dtype)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """torch's own attention function: the extra keys are put before its keys."""
        self.served += 1
        return self.extras.attention(func, args, kwargs)

    def _next(self, func: Any, name: str, own: Tensor, result: Tensor, args: Any, kwargs: Any) -> Scores:
        """What follows the result of one function of the scores.

        Raises:
            AttachmentError: it is not known what that would be.
        """
        scores = self._of(own)
        assert scores is not None
        plain = _plain(name)
        first = bool(args) and args[0] is own
        if plain in SHAPED and first and result.shape[-1] == scores.keys:
            shape, extra = (*result.shape[:-1], scores.extra.shape[-1]), scores.extra
            return replace(scores, extra=extra.expand(shape) if "expand" in plain else extra.reshape(shape))
        if result.shape[-1] != scores.keys or "out" in kwargs:
            raise self._refusal(name)
        if (plain in ALIKE and first) or (plain in TURNED and first and _keeps_last(plain, own, args, kwargs)):
            return replace(scores, extra=self._again(func, name, own, scores.extra, args, kwargs))
        if plain in MASKS:
            return self._kept(scores, result)
        others = [a for a in args if a is not own]
        if len(others) != 1 or kwargs.get("alpha", 1) != 1:
            raise self._refusal(name)
        alike = _is_number(others[0]) or (others[0].shape[-1] == 1 and scores.keys > 1)
        if plain in SUMS and not scores.soft and (first or plain == "add"):
            if not alike:
                return self._kept(scores, result)
            return replace(scores, extra=self._again(func, name, own, scores.extra, args, kwargs))
        if plain in BOUNDS and alike:
            return replace(scores, extra=self._again(func, name, own, scores.extra, args, kwargs))
        if plain in SCALES and (first or plain in ("mul", "multiply")):
            return self._rescaled(func, name, own, scores, others[0], result, args, kwargs)
        raise self._refusal(name)

    def _kept(self, scores: Scores, result: Tensor) -> Scores:
        """The scores of the extra keys as they are, for as many rows as the result has."""
        shape = *result.shape[:-1], scores.extra.shape[-1]
        return replace(scores, extra=scores.extra.to(result.dtype).expand(shape))

    def _rescaled(
        self, func: Any, name: str, own: Tensor, scores: Scores, other: Any, result: Tensor, args: Any, kwargs: Any
    ) -> Scores:
        if not _is_number(other) and other.shape[-1] == scores.keys > 1:
            if not bool(((other == 0) | (other == 1)).all()):
                raise self._refusal(f"{name} by a number for each key")
            return self._kept(scores, result)
        extra = self._again(func, name, own, scores.extra, args, kwargs)
        if scores.soft:
            return replace(scores, extra=extra)
        scale = None
        if scores.scale is not None and _is_number(other):
            scale = scores.scale * other if _plain(name) in ("mul", "multiply") else scores.scale / other
        return replace(scores, extra=extra, scale=scale)

    def _again(self, func: Any, name: str, own: Tensor, extra: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The same function of the extra keys' scores, never in place."""
        plain = _plain(name)
        if plain != name.strip("_") or (name.endswith("_") and not name.startswith("__")):
            func = getattr(Tensor, plain if hasattr(Tensor, plain) else f"__{plain}__")
        if plain == "dropout":
            extra = extra.clone()  # it may be told to work in place
        args, kwargs = _replaced(args, kwargs, own, extra)
        again: Callable[..., Tensor] = func
        return again(*args, **kwargs)


def _plain(name: str) -> str:
    """The name of a function without what tells operators, in-place and reflected forms apart; `x - s` stays so."""
    bare = name.strip("_")
    if name.startswith("__"):
        for mark in ("i", "r"):
            if bare.startswith(mark) and bare[1:] in SUMS | SCALES and bare not in ("rsub", "rtruediv", "rdiv"):
                return bare[1:]
    return bare


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0


def _replaced(args: Any, kwargs: Any, own: Tensor, by: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(by if a is own else a for a in args), {k: by if v is own else v for k, v in kwargs.items()}


def _keeps_last(plain: str, own: Tensor, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether the axis of the keys stays the last one."""
    named = [v for v in kwargs.values() if isinstance(v, int | tuple | list)]
    dims = [i for a in (*args[1:], *named) for i in (a if isinstance(a, tuple | list) else [a])]
    last = own.ndim - 1
    places = [d % own.ndim for d in dims]
    return places[-1] == last if plain == "permute" else last not in places
