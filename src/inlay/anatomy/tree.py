"""What the modules of a model tell without a run: paths, leaves and their shapes, embeddings, the head."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from inlay.anatomy.base import Axis, Kind, Leaf
from inlay.errors import QuantizationError
from inlay.sharded import shape_of

PIECES = "inlay"
"""The child under which a hosted module keeps its pieces; they are no part of the model's anatomy."""

HEADED = ("Classification", "QuestionAnswering", "MultipleChoice", "DoubleHeads", "RewardModel")


def children_of(module: nn.Module) -> list[nn.Module]:
    """The module's own children, without the pieces that a host carries."""
    return [child for name, child in module._modules.items() if child is not None and name != PIECES]


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, each once, parents first, without the pieces that hosts carry."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        inner = [
            (f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()
            if child is not None and name != PIECES
        ]
        todo.extend(reversed(inner))


def inside(path: str, outer: str) -> bool:
    """Whether a module lies strictly within another; everything lies within the model itself, whose path is ''."""
    return path.startswith(outer + ".") if outer else path != ""


def leaf_kind(module: nn.Module) -> Kind | None:
    """What a leaf is, or None where a module is no leaf: it holds no parameters, or its children hold some too."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(next(child.parameters(), None) is not None for child in children_of(module)):
        return None
    if isinstance(module, ParametrizationList):
        return None
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if set(own) <= {"weight", "bias"} and is_linear(module):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if not own:
        return None
    if all(p.ndim <= 1 for p in own.values()):
        return "norm"
    return "module"


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps features to features by a weight that can be read.

    Linear, Conv1D, quantised forms of them, and convolutions of one position.
    """
    from inlay.quant.bridge import is_pointwise, logical_shape

    weight = getattr(module, "weight", None)
    flat = isinstance(weight, Tensor) and (weight.ndim == 2 or isinstance(module, nn.Linear))
    if not flat and not is_pointwise(module):
        return False
    try:
        logical_shape(module)
    except QuantizationError:
        return False
    return True


def feature_axis(module: nn.Module) -> Axis:
    """Where a leaf has its features: second in convolutions and their norms, last in all others."""
    second = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return 1 if isinstance(module, second) else -1


def static_leaves(model: nn.Module) -> dict[str, Leaf]:
    """All leaves of the model with the shapes that their weights tell."""
    leaves: dict[str, Leaf] = {}
    last = ""
    for path, module in modules_of(model):
        kind = leaf_kind(module) if path and not (last and inside(path, last)) else None
        if kind is not None:
            last = path
            leaves[path] = _static_leaf(path, module, kind)
    return leaves


def _static_leaf(path: str, module: nn.Module, kind: Kind) -> Leaf:
    from inlay.quant.bridge import logical_shape

    shapes = [shape_of(p) for p in module._parameters.values() if p is not None]
    if kind == "linear":
        out, inn = logical_shape(module)
    elif kind == "embedding":
        inn, out = shapes[0] if shapes else (0, 0)
    elif kind == "conv":
        inn, out = module.in_channels, module.out_channels  # type: ignore[assignment]
    else:
        inn = out = shapes[0][-1] if shapes[0] else 1
    named = "expert" in f"{path} {type(module).__name__}".lower()
    experts = max((shape[0] for shape in shapes if len(shape) == 3), default=0) if kind == "module" and named else 0
    bias = isinstance(getattr(module, "bias", None), Tensor)
    return Leaf(path, kind, int(inn), int(out), bias, axis=feature_axis(module), experts=experts)


def hidden_size(model: nn.Module) -> int:
    """The width of the residual stream, as the config says it; 0 where it does not."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 0


def path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """Where a module stands."""
    return None if wanted is None else next((path for path, module in modules_of(model) if module is wanted), None)


def output_embedding(model: nn.Module) -> str | None:
    """The path of the language-model head, if there is one."""
    return path_of(model, _ask(model, "get_output_embeddings"))


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The token embedding, as the model names it."""
    return _ask(model, "get_input_embeddings")


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        answer = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def head_of(model: nn.Module, leaves: dict[str, Leaf]) -> tuple[tuple[str, ...], bool]:
    """The leaves of the task head, and whether it is the kind that is new for each task.

    A head is what stands outside `model.base_model` and is not the output embedding.
    """
    base = getattr(model, "base_model", model)
    output = output_embedding(model)
    where = path_of(model, base)
    if base is model or where is None:
        return (), False
    head = tuple(p for p in leaves if not inside(p, where) and p not in (where, output))
    return head, bool(head) and any(word in type(model).__name__ for word in HEADED)
