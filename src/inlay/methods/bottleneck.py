"""Bottleneck adapters: sequential and parallel, after attention and after the feed-forward span.

Legend: B batch, T tokens, I / O features entering / leaving a site, M bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Delta, Frozen, Method, Piece
from inlay.methods.full import Copy

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "swish", "tanh", "identity"]
Init = Literal["lora", "bert", "houlsby"]


class BottleneckDelta(Delta):
    """Δ = s W_up f(W_down LN?(z) + b_down) + b_up, where z is y (sequential), x (parallel) or x + y (residual).

    W_down has shape (M, I), W_up (O, M). The scale s is fixed, one learned number, or one learned number a feature.
    """

    def __init__(self, site: Site, method: Bottleneck) -> None:
        super().__init__()
        width = site.in_features if method.reads == "x" else site.out_features
        size = method.size_for(width)
        self.reads, self.dropout, self.activation = method.reads, method.dropout, method.activation
        self.W_down = nn.Parameter(torch.empty(size, width, dtype=torch.float32))
        self.b_down = nn.Parameter(torch.zeros(size, dtype=torch.float32))
        self.W_up = nn.Parameter(torch.empty(site.out_features, size, dtype=torch.float32))
        self.b_up = nn.Parameter(torch.zeros(site.out_features, dtype=torch.float32))
        self.norm = nn.LayerNorm(width, dtype=torch.float32) if method.layer_norm else None
        self.scale = float(method.scale) if isinstance(method.scale, int | float) else 1.0
        self.s: nn.Parameter | None = None
        if method.scale == "learned":
            self.s = nn.Parameter(torch.ones(1, dtype=torch.float32))
        elif method.scale == "channel":
            self.s = nn.Parameter(torch.ones(site.out_features, dtype=torch.float32))
        self._initialise(method.init)

    def _initialise(self, init: Init) -> None:
        if init == "lora":
            nn.init.kaiming_uniform_(self.W_down, a=math.sqrt(5))
            nn.init.zeros_(self.W_up)
        elif init == "bert":
            nn.init.normal_(self.W_down, std=0.02)
            nn.init.normal_(self.W_up, std=0.02)
        else:
            for weight in (self.W_down, self.W_up):
                nn.init.trunc_normal_(weight, std=1e-2, a=-2e-2, b=2e-2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x if self.reads == "x" else y if self.reads == "y" else x + y
        if self.norm is not None:
            z = F.layer_norm(z, z.shape[-1:], self.norm.weight.to(z.dtype), self.norm.bias.to(z.dtype), self.norm.eps)
        h = ACTIVATIONS[self.activation](F.linear(z, self.W_down.to(z.dtype), self.b_down.to(z.dtype)))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        out = F.linear(h, self.W_up.to(h.dtype), self.b_up.to(h.dtype))
        if self.s is not None:
            return out * self.s.to(out.dtype)
        return out if self.scale == 1.0 else out * self.scale


class Bottleneck(Method):
    r"""Bottleneck adapters: h ← h + s W_up f(W_down z).

    * `Bottleneck.houlsby()`: sequential (z = h), after attention and after the feed-forward span, before the residual
      sum, with the base's LayerNorms trained (Houlsby et al. 2019, arXiv:1902.00751). GELU, size 64, truncated normal
      initialisation of standard deviation 1e-2 (the paper; its code uses 1e-3). 2 M d + d + M parameters each.
    * `Bottleneck.pfeiffer()`: sequential, once a block, after the feed-forward span (Pfeiffer et al. 2021,
      arXiv:2005.00247). In post-LN blocks the adapter reads LN(o + i) and the same frozen LN runs again over the
      result, as in the reference code; in pre-LN blocks it reads the residual stream o + i.
    * `Bottleneck.parallel()`: z = x, the input of the frozen span (He et al. 2022, arXiv:2110.04366), feed-forward or
      attention. `Bottleneck.scaled_parallel()` multiplies by s = 4, the paper's best; a learned s is `scale="learned"`.

    With `init="lora"` (kaiming down, zero up) the output is unchanged at the start, bit for bit; with "bert" (normal,
    0.02) and "houlsby" it is nearly so.

    Attributes:
        size: M, the bottleneck's width.
        reduction: M as a fraction of the width, 1 / reduction; instead of size.
        sites: spans: "attn", "ffn", "attn.residual", "ffn.norm", ... (see `inlay.anatomy`), or module paths.
        reads: "y" sequential, "x" parallel, "x+y" the sum (Pfeiffer's pre-LN form, with a `.residual` site).
        scale: a number, "learned" (one number, starts at 1) or "channel" (one for each feature).
        activation, dropout (between activation and W_up), layer_norm (a new one on the adapter's input), init.
        train_norms: also train a copy of every norm of the base, as Houlsby et al. do.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "bottleneck"
    citation: ClassVar[str] = """
        @inproceedings{houlsby2019adapters,
          title={Parameter-Efficient Transfer Learning for NLP},
          author={Houlsby, Neil and Giurgiu, Andrei and Jastrzebski, Stanislaw and Morrone, Bruna and
                  de Laroussilhe, Quentin and Gesmundo, Andrea and Attariyan, Mona and Gelly, Sylvain},
          booktitle={ICML},
          eprint={1902.00751},
          year={2019}
        }
        @inproceedings{pfeiffer2021adapterfusion,
          title={AdapterFusion: Non-Destructive Task Composition for Transfer Learning},
          author={Pfeiffer, Jonas and Kamath, Aishwarya and R{\\"u}ckl{\\'e}, Andreas and Cho, Kyunghyun and
                  Gurevych, Iryna},
          booktitle={EACL},
          eprint={2005.00247},
          year={2021}
        }
        @inproceedings{he2022unified,
          title={Towards a Unified View of Parameter-Efficient Transfer Learning},
          author={He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor and Neubig, Graham},
          booktitle={ICLR},
          eprint={2110.04366},
          year={2022}
        }"""

    size: int | None = Field(default=None, ge=1)
    reduction: float | None = Field(default=None, gt=0)
    sites: str | tuple[str, ...] = ("attn", "ffn")
    reads: Literal["x", "y", "x+y"] = "y"
    scale: float | Literal["learned", "channel"] = 1.0
    activation: Activation = "gelu"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    layer_norm: bool = False
    init: Init = "lora"
    train_norms: bool = False
    layers: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Bottleneck:
        if self.size is not None and self.reduction is not None:
            raise ValueError(f"give size={self.size} or reduction={self.reduction}, not both")
        return self

    @classmethod
    def houlsby(cls, size: int = 64, **changes: object) -> Bottleneck:
        """Two sequential adapters a block and trained LayerNorms."""
        return cls(**({"size": size, "init": "houlsby", "train_norms": True} | changes))

    @classmethod
    def pfeiffer(cls, reduction: float = 16, **changes: object) -> Bottleneck:
        """One sequential adapter a block, after the feed-forward span, around its LayerNorm."""
        settings: dict[str, object] = {
            "reduction": reduction,
            "sites": ("ffn.norm",),
            "activation": "relu",
            "init": "bert",
        }
        if "size" in changes:
            settings.pop("reduction")
        return cls(**(settings | changes))

    @classmethod
    def parallel(cls, size: int = 512, sites: str | tuple[str, ...] = "ffn", **changes: object) -> Bottleneck:
        """A parallel adapter on the feed-forward span, or on attention with `sites="attn"`."""
        settings = {"size": size, "sites": sites, "reads": "x", "activation": "relu", "init": "bert"}
        return cls(**(settings | changes))

    @classmethod
    def scaled_parallel(cls, size: int = 512, scale: float | str = 4.0, **changes: object) -> Bottleneck:
        """The scaled parallel adapter, the feed-forward half of MAM: s = 4, LoRA's initialisation."""
        return cls.parallel(size, **({"scale": scale, "init": "lora"} | changes))  # type: ignore[arg-type]

    def size_for(self, width: int) -> int:
        """M for a span of this width."""
        if self.size is not None:
            return self.size
        return max(1, int(width / (self.reduction or 16)))

    def select(self, anatomy: Anatomy) -> list[Site]:
        wanted = (self.sites,) if isinstance(self.sites, str) else self.sites
        resolved = tuple(_without_post_norm(s, anatomy) for s in wanted)
        sites = anatomy.select(resolved, self.layers)
        fused = [s.leave for s in sites if s.fused]
        if fused:
            raise MethodError(f"Bottleneck takes spans or whole modules, not a part of the fused {fused[0]}.")
        if self.train_norms and anatomy.has("norm"):
            sites += [s for s in anatomy.select("norm") if s.tap == "output"]
        return sites

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Piece:
        if site.name == "norm":
            return Copy(frozen)
        reads = "x+y" if site.name.endswith(".residual") and self.reads == "y" else self.reads
        if reads == "x+y" and site.in_features != site.out_features:
            raise MethodError(f"x + y needs equal widths; {site.name} has {site.in_features} and {site.out_features}.")
        return BottleneckDelta(site, self.model_copy(update={"reads": reads}))


def _without_post_norm(selector: str, anatomy: Anatomy) -> str:
    """In a pre-LN model there is no norm after the span: Pfeiffer's adapter reads the residual stream there."""
    if selector.endswith(".norm") and not anatomy.has(selector):
        return selector.removesuffix(".norm") + ".residual"
    return selector
