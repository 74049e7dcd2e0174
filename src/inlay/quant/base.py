"""The contract of a quantised base: a code book, a config that users write, and the state that undoes it.

A weight is flattened row by row and cut into blocks of `block_size` values. Each block keeps its largest
magnitude (`absmax`, fp32); each value becomes the index of the code book entry nearest to value / absmax.
Every file beside this one that defines a config is one choice of code book.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from inlay.complaints import wrong_settings
from inlay.errors import QuantizationError

DTypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CodeBook:
    """Sixteen values in [-1, 1] and the decision rule between them.

    `values[i]` is what index i decodes to. `order` lists the indices by rising value. A scaled value x takes
    `order[k]`, where k is the number of fp32 midpoints between neighbours that are strictly below x: a tie
    goes to the lower neighbour.
    """

    name: str
    values: tuple[float, ...] = field(repr=False)
    order: tuple[int, ...] = field(repr=False, default=tuple(range(16)))

    @property
    def is_sorted(self) -> bool:
        """Whether indices rise with values, so that no translation is needed."""
        return self.order == tuple(range(16))

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The sixteen values, fp32. Shared between callers: do not write."""
        return _table(self, torch.device(device))

    def midpoints(self) -> tuple[float, ...]:
        """The fifteen decision bounds, rounded to fp32."""
        return _midpoints(self)


@cache
def _table(book: CodeBook, device: torch.device) -> Tensor:
    return torch.tensor(book.values, dtype=torch.float32, device=device)


@cache
def _midpoints(book: CodeBook) -> tuple[float, ...]:
    sorted_values = torch.tensor(book.values, dtype=torch.float32)[list(book.order)]
    return tuple(((sorted_values[:-1] + sorted_values[1:]) / 2).tolist())


@dataclass(frozen=True, eq=False)
class Nested:
    """Double quantisation: what turns the 8-bit absmax back into fp32 (see `double_quant`)."""

    absmax: Tensor  # fp32, one for `block_size` blocks of weights
    offset: Tensor  # fp32 scalar, the mean that was subtracted
    block_size: int = 256


@dataclass(frozen=True, eq=False)
class QuantState:
    """Everything besides the packed bytes that a dequantisation needs.

    `shape` is the dense (out, in) shape, `dtype` that of the tensor that was quantised. `absmax` is fp32, or
    uint8 where `nested` is given.
    """

    book: CodeBook
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    absmax: Tensor
    nested: Nested | None = None

    @property
    def numel(self) -> int:
        """How many weights there are."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


class BlockQuantization(BaseModel):
    """Settings shared by all blockwise 4-bit code books.

    Args:
        double_quant: store the block scales in 8 bits (arXiv:2305.14314, section 3): 4.127 instead of 4.5
            bits a parameter at block size 64.
        compute_dtype: what matrix products run in, as a name or a `torch.dtype`; None takes the dtype of the
            input, or that of autocast.
        block_size: weights that share one scale.
        skip: linear layers that stay dense, named as in `BitsAndBytesConfig.llm_int8_skip_modules`: the start of
            a module's path, its end, or a regular expression for its start. None keeps what the paper keeps
            dense: the output or task head and whatever is tied to an embedding. A tuple says exactly which, so
            `()` quantises the head as well. Modules that the model declares as needing fp32 stay dense always.
            Embeddings are no linear layers and stay as they are.
        storage: the dtype that the packed bytes are declared as. FSDP2 shards floating-point storage only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise QuantizationError(wrong_settings(type(self), error)) from None

    double_quant: bool = True
    compute_dtype: DTypeName | None = None
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    skip: tuple[str, ...] | None = None
    storage: DTypeName | Literal["uint8"] = Field(default="uint8")

    book: ClassVar[CodeBook]

    @field_validator("compute_dtype", "storage", mode="before")
    @classmethod
    def _dtype_name(cls, value: Any) -> Any:
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

    @property
    def quant_type(self) -> str:
        """The name of the code book in files: `nf4`, `fp4` or `int4`."""
        return self.book.name
