"""The two baselines: training everything, and training the task head alone.

Legend: B batch, T tokens, I / O features entering / leaving a module.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Frozen, Method, Piece, Replacement


class Copy(Replacement):
    """A trainable fp32 copy of a frozen module, used instead of it: y = module'(x).

    The base module keeps its bits, so removing the copy restores the model, and rows of one batch may use different
    copies.
    """

    def __init__(self, frozen: Frozen) -> None:
        super().__init__()
        self.module, self.frozen = frozen.copy(), frozen.keep()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = next(self.module.parameters())
        if not isinstance(x, Tensor) or not x.is_floating_point():
            # An embedding gives the dtype that the rest of the model computes in.
            y = self.module(x, *args, **kwargs)
            return y.to(self.frozen.dtype) if isinstance(y, Tensor) else y
        if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
            return self.module(x, *args, **kwargs)  # type: ignore[no-any-return]
        cast = {name: p.to(x.dtype) for name, p in self.module.named_parameters()}
        return functional_call(self.module, cast, (x, *args), kwargs)  # type: ignore[no-any-return]

    def stored(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict(tensors)


class Full(Method):
    """Full fine-tuning: every parameter of the model is trained.

    Each module with parameters is replaced by a trainable copy, so the adapter is the whole model in size; it is the
    yardstick, not a recommendation. Learning rates are about a tenth of LoRA's.

    Attributes:
        sites: what to train; everything by default. `sites=["norm"]` gives LayerNorm tuning.
        layers: only these blocks.
    """

    tag: ClassVar[str] = "full"
    citation: ClassVar[str] = """
        @inproceedings{devlin2019bert,
          title={BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding},
          author={Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina},
          booktitle={NAACL},
          year={2019}
        }"""

    sites: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None

    def select(self, anatomy: Anatomy) -> list[Site]:
        return anatomy.select(("*",) if self.sites is None else self.sites, self.layers)

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Piece:
        if site.fused:
            raise MethodError(
                f"Full trains whole modules; {site.name!r} is a part of {site.leave}. Name the module instead."
            )
        return Copy(frozen)


class HeadOnly(Method):
    """Linear probing: nothing but the task head is trained. The floor that every method must beat."""

    tag: ClassVar[str] = "head"
    citation: ClassVar[str] = """
        @inproceedings{alain2017probes,
          title={Understanding intermediate layers using linear classifier probes},
          author={Alain, Guillaume and Bengio, Yoshua},
          booktitle={ICLR workshop},
          eprint={1610.01644},
          year={2017}
        }"""

    def select(self, anatomy: Anatomy) -> list[Site]:
        if not anatomy.head:
            raise MethodError(
                f"HeadOnly needs a task head, and {anatomy.model} has none besides its output embedding. Use another "
                "method, or name modules with Full(sites=[...])."
            )
        return anatomy.select("head")

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> Piece:
        return Copy(frozen)
