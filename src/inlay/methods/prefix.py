"""Prefix tuning: learned keys and values in front of those of every attention.

Legend: B batch, T tokens, I features entering the attention, P prefix length, M width of the MLP, H key/value heads,
D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Heads, Site
from inlay.errors import FormatError, MethodError
from inlay.methods.base import ExtraKV, Frozen, Method
from inlay.methods.positions import ShiftedPositions, position_sites


class Trunk(nn.Module):
    """h_PM = tanh(E W_1^T + b_1), with E of shape (P, I) and W_1 (M, I): what the layers of one kind share."""

    def __init__(self, length: int, width: int, mid: int) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.randn(length, width, dtype=torch.float32))
        self.W_1 = nn.Parameter(torch.empty(mid, width, dtype=torch.float32))
        self.b_1 = nn.Parameter(torch.empty(mid, dtype=torch.float32))
        init_linear(self.W_1, self.b_1)

    def forward(self) -> Tensor:
        """The hidden layer, one row for each prefix position."""
        return torch.tanh(F.linear(self.E, self.W_1, self.b_1))


class Trunks(nn.Module):
    """One trunk for each kind of attention: encoder self, decoder self, cross. Made when first asked for."""

    def __init__(self, length: int, mid: int) -> None:
        super().__init__()
        self.length, self.mid = length, mid

    def take(self, site: Site) -> tuple[Trunk, bool]:
        """The trunk for a site's kind of attention, and whether this is the first to ask for it."""
        kind = f"{site.stack or 'self'}_{'cross' if site.name.startswith('cross') else 'self'}"
        known = self._modules.get(kind)
        if isinstance(known, Trunk):
            return known, False
        made = Trunk(self.length, site.in_features, self.mid)
        self.add_module(kind, made)
        return made, True


class PrefixKV(ExtraKV):
    """P_k of shape (P, H D) and P_v (P, H D_v), split by head; free parameters, or the output of an MLP.

    With an MLP, (P_k, P_v) = h W_2^T + b_2, where h comes from a trunk that the layers of one kind share. It is
    computed in fp32, so that the stored prefix is the one that was trained. What is stored is P_k and P_v alone; a
    piece that takes them back is in the direct form and trains on as such.
    """

    def __init__(
        self,
        site: Site,
        length: int,
        std: float = 0.02,
        dropout: float = 0.0,
        trunks: Trunks | None = None,
    ) -> None:
        super().__init__()
        heads = heads_of(site)
        self.length, self.dropout = length, dropout
        self.heads, self.key_size, self.value_size = heads.kv, heads.key_size, heads.value_size
        self._trunk: tuple[Trunk, ...] = ()
        widths = self.heads * self.key_size, self.heads * self.value_size
        if trunks is None:
            self.P_k = nn.Parameter(torch.randn(length, widths[0], dtype=torch.float32) * std)
            self.P_v = nn.Parameter(torch.randn(length, widths[1], dtype=torch.float32) * std)
            return
        trunk, first = trunks.take(site)
        if first:
            self.trunk = trunk
        # The first piece owns the trunk; the others hold it in a tuple, which registers nothing, so that it is listed
        # and saved once, while copies of the whole model still share it.
        self._trunk = (trunk,)
        self.W_2 = nn.Parameter(torch.empty(sum(widths), trunks.mid, dtype=torch.float32))
        self.b_2 = nn.Parameter(torch.empty(sum(widths), dtype=torch.float32))
        init_linear(self.W_2, self.b_2)

    @property
    def direct(self) -> bool:
        """Whether P_k and P_v are the parameters themselves."""
        return len(self._trunk) == 0

    def every_parameter(self) -> list[nn.Parameter]:
        """What the prefix is computed from, the shared trunk included."""
        return [*self.parameters(), *(p for trunk in self._trunk for p in trunk.parameters())]

    def prefix(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v in fp32."""
        if self.direct:
            return self.P_k, self.P_v
        h = self._trunk[0]().to(self.W_2.device)
        both = F.linear(h, self.W_2, self.b_2)
        k, v = both.split([self.heads * self.key_size, self.heads * self.value_size], dim=-1)
        return k, v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.direct or x.is_meta or not torch.is_autocast_enabled(x.device.type):
            k, v = self.prefix()
        else:
            with torch.autocast(x.device.type, enabled=False):
                k, v = self.prefix()
        return self._split(k, self.key_size, x), self._split(v, self.value_size, x)

    def _split(self, p: Tensor, size: int, x: Tensor) -> Tensor:
        heads = p.to(x.dtype).view(1, self.length, self.heads, size).transpose(1, 2)
        if self.dropout and self.training:
            # Each row of the batch drops its own entries, as in the published codes.
            heads = F.dropout(heads.expand(x.shape[0], -1, -1, -1), self.dropout)
        return heads

    def stored(self) -> dict[str, Tensor]:
        with torch.no_grad():
            k, v = self.prefix()
        return {"P_k": k.detach().contiguous(), "P_v": v.detach().contiguous()}

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        spec = self.stored_spec()
        wrong = {n: tuple(t.shape) for n, t in tensors.items() if n not in spec or t.shape != spec[n]}
        if wrong or tensors.keys() != spec.keys():
            raise FormatError(f"a prefix is P_k and P_v of shapes {dict(spec)}, not {wrong or sorted(tensors)}.")
        like = self.P_k if self.direct else self.W_2
        for name in ("trunk", "W_2", "b_2"):
            if hasattr(self, name):
                delattr(self, name)
        self._trunk = ()
        for name in ("P_k", "P_v"):
            value = tensors[name].detach().to(like.device, torch.float32, copy=True)
            setattr(self, name, nn.Parameter(value, requires_grad=like.requires_grad))

    def stored_spec(self) -> dict[str, torch.Size]:
        return {
            "P_k": torch.Size((self.length, self.heads * self.key_size)),
            "P_v": torch.Size((self.length, self.heads * self.value_size)),
        }


class Prefix(Method):
    r"""Prefix tuning: in every attention K ← [P_k; K] and V ← [P_v; V].

    Li & Liang 2021, arXiv:2101.00190. He et al. 2022, arXiv:2110.04366, eq. 7, write the same as a gated sum,
    (1 - λ) Attn(q, K, V) + λ Attn(q, P_k, P_v), where λ is the share of attention that goes to the prefix.

    Encoders, decoders and cross-attention each have prefixes of their own. The keys stand in front of those that the
    model computes (after its rotary embedding), every query sees them, in sliding-window layers too, and they shift no
    position and take no place in the KV cache. (Libraries that pass them as `past_key_values` shift positions by P.)

    `mid` sets the reparametrisation (P_k, P_v) = W_2 tanh(W_1 E + b_1) + b_2, one MLP for each kind of attention, with
    E of width I from N(0, 1), as in the reference code (the paper's footnote 4 has a narrower E). It only serves
    training: P_k and P_v are stored, the rest is dropped unless saved with `keep_training_state=True`. The paper uses
    mid 512 (tables to text) and 800 (summaries), length 10 (E2E 5) and 200, AdamW at 5e-5. The direct form wants 1e-3
    to 5e-3.

    With little data, start from the activations of real words: `inlay.init_prefix_from_words`.

    Trained parameters: 2 P H D for each attention; with an MLP P I + I M + M for each kind, and (M + 1) 2 H D for each
    attention. Stored: 2 P H D for each attention.

    Attributes:
        length: P.
        mid: M, the width of the MLP; None trains P_k and P_v directly.
        dropout: probability of zeroing an entry of the prefix, for each row, during training.
        std: standard deviation of P_k and P_v at the start in the direct form (0.02: He et al.'s code).
        sites: "heads" (self-attention) and "cross.heads", also behind "encoder:" or "decoder:"; None takes all.
        layers: only these blocks, negative numbers from the end.
        shifts_positions: the tokens' positions begin behind the prefix, as where it is passed as `past_key_values`; for
            prefixes that were trained so. Only for models that look positions up in a table (GPT-2, OPT, BERT, BART).
    """

    tag: ClassVar[str] = "prefix"
    citation: ClassVar[str] = """
        @inproceedings{li2021prefix,
          title={Prefix-Tuning: Optimizing Continuous Prompts for Generation},
          author={Li, Xiang Lisa and Liang, Percy},
          booktitle={ACL},
          eprint={2101.00190},
          year={2021}
        }"""

    length: int = Field(default=10, ge=1)
    mid: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    std: float = Field(default=0.02, ge=0.0)
    sites: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    shifts_positions: bool = False

    def select(self, anatomy: Anatomy) -> list[Site]:
        sites = attention_sites(anatomy, self.sites, self.layers)
        return [*position_sites(anatomy, sites), *sites] if self.shifts_positions else sites

    def shared(self, sites: Sequence[Site]) -> Trunks | None:
        return None if self.mid is None else Trunks(self.length, self.mid)

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> PrefixKV | ShiftedPositions:
        if site.heads is None:
            return ShiftedPositions(frozen, self.length)
        trunks = shared if isinstance(shared, Trunks) else None
        return PrefixKV(site, self.length, self.std, self.dropout, trunks)


def attention_sites(
    anatomy: Anatomy, selectors: str | tuple[str, ...] | None, layers: Sequence[int] | None
) -> list[Site]:
    """The attentions that selectors name; all attentions where there are none.

    Raises:
        SiteError: the model has no such attention, or none that goes through transformers' attention interface.
        MethodError: a selector names something other than an attention.
    """
    if selectors is None:
        selectors = tuple(n for n in ("heads", "cross.heads") if anatomy.has(n)) or ("heads",)
    sites = anatomy.select(selectors, layers)
    for site in sites:
        if site.heads is None:
            raise MethodError(
                f"keys and values go to attentions ('heads', 'cross.heads'); {site.name!r} ({site.leave}) is none."
            )
    return sites


def heads_of(site: Site) -> Heads:
    """The shapes of the attention at a site."""
    assert site.heads is not None
    return site.heads


def init_linear(weight: nn.Parameter, bias: nn.Parameter) -> None:
    """The initialisation of `torch.nn.Linear`."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(bias, -bound, bound)
