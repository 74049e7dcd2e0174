"""P-tuning: virtual tokens at any places of a template, made by a small network.

Legend: P virtual tokens, I features of an embedding, H hidden features of the LSTM in each direction, G = 4 H gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import InlayError
from inlay.methods.base import Frozen, Method, VirtualTokens
from inlay.methods.prompt import Lender, build_once, edge_of, embeddings
from inlay.template import Template


class BiLSTM(nn.Module):
    """A bidirectional LSTM over one short sequence, with the parameters of `nn.LSTM` under the same names.

    Written out, because the fused kernels give other bits with and without gradients, so that what is stored would not
    be what was trained, and because `torch.compile` does not take `nn.LSTM`.
    """

    def __init__(self, size: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.layers, self.dropout = hidden, layers, dropout
        for layer in range(layers):
            inside = size if layer == 0 else 2 * hidden
            shapes = {"weight_ih": (4 * hidden, inside), "weight_hh": (4 * hidden, hidden), "bias_ih": (4 * hidden,)}
            for name, shape in {**shapes, "bias_hh": (4 * hidden,)}.items():
                for way in ("", "_reverse"):
                    start = torch.empty(shape).uniform_(-(hidden**-0.5), hidden**-0.5)
                    self.register_parameter(f"{name}_l{layer}{way}", nn.Parameter(start))

    def forward(self, x_PI: Tensor) -> Tensor:
        """The hidden states of both directions, of shape (P, 2 H)."""
        for layer in range(self.layers):
            if layer and self.dropout and self.training:
                x_PI = F.dropout(x_PI, self.dropout)
            x_PI = self._layer(x_PI, layer)
        return x_PI

    def _layer(self, x_PI: Tensor, layer: int) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = (self._both(n, layer) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        gates_2PG = torch.stack([x_PI, x_PI.flip(0)]) @ w_ih.mT + (b_ih + b_hh)[:, None]
        h = c = x_PI.new_zeros(2, 1, self.hidden)
        states = []
        for step in range(x_PI.shape[0]):
            i, f, g, o = (gates_2PG[:, step : step + 1] + h @ w_hh.mT).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        forth, back = torch.cat(states, dim=1)
        return torch.cat([forth, back.flip(0)], dim=-1)

    def _both(self, name: str, layer: int) -> Tensor:
        return torch.stack([getattr(self, f"{name}_l{layer}"), getattr(self, f"{name}_l{layer}_reverse")])


class PromptEncoder(nn.Module):
    """h = MLP(BiLSTM(E)), or MLP(E), with E of shape (P, I)."""

    def __init__(self, length: int, size: int, kind: str, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.randn(length, size))
        self.lstm = BiLSTM(size, hidden, layers, dropout) if kind == "lstm" else None
        wide = 2 * hidden if kind == "lstm" else size
        self.mlp = nn.Sequential(nn.Linear(wide, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self) -> Tensor:
        """h_PI"""
        if self.E.is_meta or not torch.is_autocast_enabled(self.E.device.type):
            return self._result()
        with torch.autocast(self.E.device.type, enabled=False):
            return self._result()

    def _result(self) -> Tensor:
        return self.mlp(self.E if self.lstm is None else self.lstm(self.E))  # type: ignore[no-any-return]


class PTuningTokens(VirtualTokens):
    """The encoder's result. Only that is stored; a piece read from disk holds it in place of the encoder."""

    h: Tensor

    def __init__(self, encoder: PromptEncoder, template: str, places: tuple[tuple[int, int], ...] | None) -> None:
        super().__init__()
        self.template, self.places = template, places
        self.length = encoder.E.shape[0]
        self.encoder: PromptEncoder | None = encoder

    def forward(self) -> Tensor:
        return self.encoder() if self.encoder is not None else self.h

    def stored(self) -> dict[str, Tensor]:
        if self.encoder is None:
            return {"h": self.h}
        training = self.encoder.training
        self.encoder.eval()
        with torch.no_grad():
            h = self.encoder()
        self.encoder.train(training)
        return {"h": h}

    def stored_spec(self) -> dict[str, torch.Size]:
        return {"h": torch.Size((self.length, self.size))}

    @property
    def size(self) -> int:
        """I"""
        return self.encoder.E.shape[1] if self.encoder is not None else self.h.shape[1]

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        device = next(self.parameters()).device
        self.encoder = None
        self.h = nn.Parameter(tensors["h"].detach().clone().to(device, torch.float32))


class PTuning(Method):
    r"""P-tuning: {h_1 .. h_i, e(x), h_i+1 .. h_m, e([MASK])}, h = MLP(BiLSTM(E)) (Liu et al. 2021, arXiv:2103.10385).

    Virtual tokens stand at any places of a template; a small network makes them from trained vectors E of shape (P, I),
    and only its result h is stored. What the two reference codes do:
    * LAMA: BiLSTM of `hidden` = I / 2 and 2 layers, MLP I-I-I with ReLU, the language model frozen. Template of BERT
      `"{prompt:3} [MASK] {prompt:3} {subject} {prompt:3}"`, of GPT `"{prompt:3} {subject} {prompt:3}"`.
    * few-shot SuperGLUE: BiLSTM of `hidden` = I, MLP 2I-I-I, or the MLP alone; the language model is tuned as well:
      `PTuning(...) + Full()`, with 1e-4 for the prompt and 1e-5 for the model. Template of RTE
      `"{premise} Question: {hypothesis}? {prompt:1} Answer: [MASK]."`; words that stay ("?", "Answer:") are anchors.
    The answer is read at [MASK], or behind the last token of a causal model, by an `inlay.Verbalizer`.

    Where runs stand at the ends of the text only ("{prompt:20} {text}"), the model takes ordinary ids and puts them
    in; in an encoder alone between [CLS] and [SEP], the first and the last token. Other templates need ids from
    `inlay.fill_template`, or `PTuning.from_template(tokenizer, ...)`, which counts the special tokens between a run and
    the end of the row; then ordinary ids of the same text do as well.

    Trained parameters with the default encoder: P I + 2 (4 H (I + H + 2)) + 2 (4 H (3 H + 2)) + 2 H I + I + I (I + 1);
    8,278,272 for P = 9, I = 768, H = 384. Stored: P I = 6,912.

    Attributes:
        template: where the virtual tokens stand; see `inlay.Template`.
        encoder: "lstm" (BiLSTM and MLP) or "mlp".
        hidden: H; by default I / 2 as for LAMA.
        layers: of the LSTM.
        dropout: between the layers of the LSTM.
        places: where the runs stand in rows of ordinary ids; (at, count) counts `at` tokens from the first, or ~at from
            the last. `from_template` fills it in.
    """

    tag: ClassVar[str] = "p_tuning"
    citation: ClassVar[str] = """
        @article{liu2021gpt,
          title={GPT Understands, Too},
          author={Liu, Xiao and Zheng, Yanan and Du, Zhengxiao and Ding, Ming and Qian, Yujie and Yang, Zhilin and
                  Tang, Jie},
          journal={arXiv:2103.10385},
          eprint={2103.10385},
          year={2021}
        }"""

    template: str = "{prompt:20} {text}"
    encoder: Literal["lstm", "mlp"] = "lstm"
    hidden: int | None = Field(default=None, ge=1)
    layers: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    places: tuple[tuple[int, int], ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> PTuning:
        try:
            template = Template(self.template)
        except InlayError as error:
            raise ValueError(str(error)) from error
        if self.places is not None and tuple(count for _, count in self.places) != template.counts:
            raise ValueError(f"places {self.places} do not have the counts {template.counts} of the template's runs.")
        return self

    @classmethod
    def from_template(cls, tokenizer: Any, template: str, **settings: Any) -> PTuning:
        """P-tuning whose template was counted out with a tokenizer.

        Args:
            tokenizer: the model's.
            template: where the virtual tokens stand, between what the tokenizer adds by itself.
            settings: the other attributes.
        """
        return cls(template=template, places=Template(template).places(tokenizer), **settings)

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return Template(self.template).length

    def select(self, anatomy: Anatomy) -> list[Site]:
        return embeddings(anatomy, "PTuning")

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return Lender()

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> VirtualTokens:
        return build_once(shared, site, lambda: self._tokens(site))

    def _tokens(self, site: Site) -> PTuningTokens:
        size, template = site.out_features, Template(self.template)
        hidden = self.hidden or max(1, size // 2)
        encoder = PromptEncoder(template.length, size, self.encoder, hidden, self.layers, self.dropout)
        return PTuningTokens(encoder, self.template, self.places or template.at_ends(edge_of(site)))
