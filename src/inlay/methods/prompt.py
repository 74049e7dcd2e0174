"""Prompt tuning: virtual tokens before the text.

Legend: P virtual tokens, I features of an embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from inlay.anatomy.base import Anatomy, Site
from inlay.errors import MethodError
from inlay.methods.base import Frozen, Method, VirtualTokens

SAMPLED = 5000
"""The most frequent ids, from which the paper samples."""


class PromptTokens(VirtualTokens):
    """e = P, of shape (length, I), after the first `after` tokens of a row."""

    def __init__(self, P: Tensor, after: int) -> None:
        super().__init__()
        self.length = P.shape[0]
        self.places = ((after, self.length),)
        self.P = nn.Parameter(P.detach().clone().float())

    def forward(self) -> Tensor:
        return self.P


class Borrowed(VirtualTokens):
    """The same tokens at another embedding of the model; the parameters belong to the first."""

    def __init__(self, lender: VirtualTokens) -> None:
        super().__init__()
        self.length, self.places = lender.length, lender.places
        self.__dict__["lender"] = (lender,)

    def forward(self) -> Tensor:
        lender: VirtualTokens = self.__dict__["lender"][0]
        return lender()  # type: ignore[no-any-return]


class Blank(Borrowed):
    """Nothing: another embedding that reads the same ids sees padding where virtual tokens stand."""

    def __init__(self) -> None:
        VirtualTokens.__init__(self)
        self.length, self.places = 0, ()

    def forward(self) -> Tensor:
        raise NotImplementedError("padding stands here, and the host puts it in")


class Lender(nn.Module):
    """Remembers the first piece of an adapter, for the others to borrow from."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["first"] = None


def embeddings(anatomy: Anatomy, method: str) -> list[Site]:
    """Where virtual tokens are served: the token embedding, in an encoder-decoder that of the encoder.

    A model with a task head that copies its input to the decoder (BART's and T5's classifiers) carries the virtual
    tokens along, so there the decoder serves them too. Further embeddings of the whole vocabulary, such as Gemma 4's
    for each layer, read the same ids and get padding in their place.

    Raises:
        MethodError: the model has no token embedding that was seen to run.
    """
    sites = anatomy.select("embed") if anatomy.embed else []
    if not sites:
        raise MethodError(
            f"{method} needs the token embedding, and {anatomy.model} names none (get_input_embeddings). Attach to the "
            "text model itself."
        )
    if anatomy.encoder_decoder:
        return sites if anatomy.new_head else sites[:1]
    size = sites[0].in_features
    leaves = anatomy.leaves.items()
    others = [p for p, e in leaves if e.kind == "embedding" and e.called and e.in_features == size]
    return sites[:1] + [s for p in others if p not in anatomy.embed for s in anatomy.select(p)]


def edge_of(site: Site) -> int:
    """How many tokens at each end of a row are not text: [CLS] and [SEP] in an encoder alone."""
    return 0 if site.causal else 1


def build_once(shared: nn.Module | None, site: Site, make: Callable[[], VirtualTokens]) -> VirtualTokens:
    """The piece for the first embedding, and one that borrows from it for each other token embedding."""
    assert isinstance(shared, Lender)
    if site.name != "embed":
        return Blank()
    first = shared.__dict__["first"]
    if isinstance(first, VirtualTokens):
        return Borrowed(first)
    made = make()
    shared.__dict__["first"] = made
    return made


def sample(count: int, vocabulary: int) -> Tensor:
    """Ids drawn without replacement from the first 5000; with replacement only where more are asked for."""
    limit = min(SAMPLED, vocabulary)
    if count <= limit:
        return torch.randperm(limit, device="cpu")[:count]
    return torch.randint(limit, (count,), device="cpu")


class Prompt(Method):
    r"""Prompt tuning: X = [P; E(x)], and only P of shape (length, I) is trained (Lester et al. 2021, arXiv:2104.08691).

    The virtual tokens stand before the text; in an encoder-decoder before the encoder's, and the decoder has none. In
    an encoder alone they stand behind its first token, [CLS], where classifiers read (the paper has no such models).
    Calling the model and `generate` with ordinary token ids is enough: they are put in, and taken out of what comes
    back. They take up `length` positions. Call the model that the adapter was attached to: a part of it
    (`model.bert(...)`) sees no prompt.

    Initialisation, as in section 2.2:
    * "vocab": embeddings of sampled tokens, drawn without replacement from the 5000 first ids.
    * "uniform": uniform in [-scale, scale]. The paper says [-0.5, 0.5]; its code draws from [0, 0.5].
    * "classes": row i is the mean of the embeddings of the tokens of class i's name; other rows as in "vocab".
    * "text": row i is the embedding of token i of a text; other rows as in "vocab".
    `Prompt.from_classes` and `Prompt.from_text` turn strings into the ids that the last two need.

    Trained parameters: length I. The output changes from the start, whatever the initialisation. The paper trains with
    Adafactor at a constant learning rate of 0.3; with AdamW, 1e-3 to 1e-2 is usual.

    Attributes:
        length: P, the number of virtual tokens; 20 to 100, the paper's default is 100.
        init: one of the four above.
        scale: half the width of the uniform distribution.
        text_ids: the tokens of the text, at most `length`.
        class_ids: the tokens of each class's name, at most `length` classes.
        after: how many tokens of a row stay before the virtual ones; by default 1 in an encoder alone, 0 elsewhere.
            PEFT puts them before everything, so that BERT's classifiers read a virtual token.
    """

    tag: ClassVar[str] = "prompt"
    citation: ClassVar[str] = """
        @inproceedings{lester2021prompt,
          title={The Power of Scale for Parameter-Efficient Prompt Tuning},
          author={Lester, Brian and Al-Rfou, Rami and Constant, Noah},
          booktitle={EMNLP},
          eprint={2104.08691},
          year={2021}
        }"""

    length: int = Field(default=20, ge=1)
    init: Literal["vocab", "uniform", "text", "classes"] = "vocab"
    scale: float = Field(default=0.5, gt=0.0)
    text_ids: tuple[int, ...] = ()
    class_ids: tuple[tuple[int, ...], ...] = ()
    after: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        given = {"text": self.text_ids, "classes": self.class_ids}
        for init, ids in given.items():
            helper = "Prompt.from_text(tokenizer, ...)" if init == "text" else "Prompt.from_classes(tokenizer, [...])"
            if (self.init == init) != bool(ids):
                raise ValueError(
                    f"init={self.init!r} with {len(ids) or 'no'} ids of {init}: they go together. {helper} makes both."
                )
            if len(ids) > self.length:
                raise ValueError(
                    f"{len(ids)} {'tokens of the text' if init == 'text' else 'classes'} do not fit into "
                    f"length={self.length} virtual tokens. Raise length, or give fewer."
                )
        if any(not ids for ids in self.class_ids):
            raise ValueError("a class without tokens: every class name must have at least one.")
        return self

    @classmethod
    def from_text(cls, tokenizer: Any, text: str, length: int | None = None) -> Prompt:
        """A prompt that starts as a text.

        Args:
            tokenizer: the model's.
            text: for example "Classify the sentiment of this review:".
            length: number of virtual tokens; by default as many as the text has tokens.
        """
        ids = _ids(tokenizer, text)
        return cls(length=length or max(1, len(ids)), init="text", text_ids=ids)

    @classmethod
    def from_classes(cls, tokenizer: Any, classes: Sequence[str], length: int = 20) -> Prompt:
        """A prompt whose first rows start as the names of the classes.

        Args:
            tokenizer: the model's.
            classes: their names, as they are written in running text.
            length: number of virtual tokens, at least as many as there are classes.
        """
        return cls(length=length, init="classes", class_ids=tuple(_ids(tokenizer, name) for name in classes))

    def select(self, anatomy: Anatomy) -> list[Site]:
        return embeddings(anatomy, "Prompt")

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return Lender()

    def build(self, site: Site, frozen: Frozen, shared: nn.Module | None) -> VirtualTokens:
        after = edge_of(site) if self.after is None else self.after
        return build_once(shared, site, lambda: PromptTokens(self._start(site, frozen), after))

    def _start(self, site: Site, frozen: Frozen) -> Tensor:
        """The first value of P."""
        if self.init == "uniform":
            return torch.empty(self.length, site.out_features).uniform_(-self.scale, self.scale)
        vocabulary = site.in_features
        wrong = [i for ids in (self.text_ids, *self.class_ids) for i in ids if not 0 <= i < vocabulary]
        if wrong:
            raise MethodError(
                f"ids {wrong[:5]} are not in the vocabulary of {vocabulary} tokens: another tokenizer made them."
            )
        rows = frozen.embed(sample(self.length, vocabulary))
        if self.init == "text":
            rows = torch.cat([frozen.embed(torch.tensor(self.text_ids)), rows[len(self.text_ids) :]])
        if self.init == "classes":
            means = [frozen.embed(torch.tensor(ids)).float().mean(0) for ids in self.class_ids]
            rows = torch.cat([torch.stack(means), rows[len(means) :].float()])
        return rows


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
