"""Templates that say where virtual tokens stand in a text, and rows of token ids made from them.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.errors import DataError, MethodError, nearest

if TYPE_CHECKING:
    from inlay.adapter import Adapter

GROUP = "prompt"
Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """A run of virtual tokens (count > 0), a field (name), or plain text."""

    text: str = ""
    field: str = ""
    count: int = 0


@dataclass(frozen=True)
class Rendered:
    """A row as text without its virtual tokens.

    Attributes:
        text: the text.
        groups: for each run of virtual tokens, the character before which it stands.
        fields: the characters of each field, (from, to).
    """

    text: str
    groups: tuple[int, ...]
    fields: Mapping[str, tuple[int, int]]


class Template:
    """A text with fields and runs of virtual tokens: `"{prompt:3} {text} {prompt:3} [MASK]"`.

    `{prompt:n}` is a run of n virtual tokens, `{name}` a field of the row, everything else is text; `{{` is a brace.
    What a tokenizer adds by itself ([CLS], [SEP], <s>) is no part of a template. Without its runs a template is an
    ordinary text, in which blanks around a run become one.

    Args:
        source: the template.
        bare: it may be without virtual tokens.

    Raises:
        MethodError: there is no run of virtual tokens, or a brace that cannot be read.
    """

    def __init__(self, source: str, *, bare: bool = False) -> None:
        self.source = source
        self.parts = tuple(self._parse(source))
        self.counts = tuple(part.count for part in self.parts if part.count)
        self._segments: list[list[Part]] = [[]]
        for part in self.parts:
            if part.count:
                self._segments.append([])
            else:
                self._segments[-1].append(part)
        self.fields = tuple(dict.fromkeys(part.field for part in self.parts if part.field))
        if not self.counts and not bare:
            raise MethodError(f"template {source!r} has no virtual tokens; write {{prompt:3}} where 3 should stand.")

    def _parse(self, source: str) -> list[Part]:
        parts: list[Part] = []
        try:
            pieces = list(string.Formatter().parse(source))
        except ValueError as error:
            raise MethodError(f"template {source!r}: {error}. A literal brace is written twice: {{{{.") from error
        for text, name, spec, conversion in pieces:
            if text:
                parts.append(Part(text=text))
            if name is None:
                continue
            if name == GROUP:
                if not (spec or "").isdecimal() or int(spec or "0") < 1 or conversion:
                    raise MethodError(f"template {source!r}: {{prompt:n}} needs a number of tokens n of at least 1.")
                parts.append(Part(count=int(spec or "0")))
            elif not name.isidentifier() or spec or conversion:
                raise MethodError(f"template {source!r}: {{{name}}} is no field; a field is a name, as in {{text}}.")
            else:
                parts.append(Part(field=name))
        return parts

    @property
    def length(self) -> int:
        """How many virtual tokens there are."""
        return sum(self.counts)

    def render(self, row: Mapping[str, str]) -> Rendered:
        """The row as text, and where the virtual tokens go.

        Raises:
            DataError: a field is missing or no text.
        """
        text, blank, last = "", False, len(self._segments) - 1
        groups, fields = list[int](), dict[str, tuple[int, int]]()
        for index, segment in enumerate(self._segments):
            raw, spans = self._joined(segment, row)
            begin = len(raw) - len(raw.lstrip()) if index else 0
            end = len(raw.rstrip()) if index < last else len(raw)
            if index:
                groups.append(len(text))
                blank = blank or begin > 0
            if end <= begin:
                blank = blank or bool(raw)
                continue
            text += " " if blank and text and index else ""
            fields |= {n: (len(text) + max(a, begin) - begin, len(text) + min(b, end) - begin) for n, a, b in spans}
            text, blank = text + raw[begin:end], end < len(raw)
        return Rendered(text, tuple(groups), fields)

    def _joined(self, segment: Sequence[Part], row: Mapping[str, str]) -> tuple[str, list[tuple[str, int, int]]]:
        """The text between two runs, and the characters of its fields."""
        raw, spans = "", list[tuple[str, int, int]]()
        for part in segment:
            added = self._value(part.field, row) if part.field else part.text
            if part.field:
                spans.append((part.field, len(raw), len(raw) + len(added)))
            raw += added
        return raw, spans

    def _value(self, name: str, row: Mapping[str, str]) -> str:
        if name not in row:
            raise DataError(f"the row has no field {name!r} of template {self.source!r}: {nearest(name, row)}")
        if not isinstance(row[name], str):
            raise DataError(f"field {name!r} must be a text, not {type(row[name]).__name__}.")
        return row[name]

    def at_ends(self, edge: int) -> Places | None:
        """The places of a template of nothing but one field and runs before and behind it; None for any other.

        Args:
            edge: how many tokens at each end of a row are no part of the template.
        """
        content = [part for part in self.parts if not part.count and part.text.strip() + part.field]
        if len(content) != 1 or not content[0].field:
            return None
        middle = self.parts.index(content[0])
        return tuple((edge if i < middle else ~edge, part.count) for i, part in enumerate(self.parts) if part.count)

    def places(self, tokenizer: Any) -> Places | None:
        """Where each run stands, counted in tokens from the first or the last one of a row.

        That can be told where nothing but special tokens, such as [MASK], lies between the run and that end; None
        where a run stands between other texts.
        """
        before, behind = specials(tokenizer)
        places: list[tuple[int, int]] = []
        for index, part in enumerate(self.parts):
            if not part.count:
                continue
            left, right = (_special_tokens(parts, tokenizer) for parts in (self.parts[:index], self.parts[index + 1 :]))
            if left is not None:
                places.append((before + left, part.count))
            elif right is not None:
                places.append((~(behind + right), part.count))
            else:
                return None
        return tuple(places)


def _special_tokens(parts: Sequence[Part], tokenizer: Any) -> int | None:
    """How many tokens these parts are, if all are special ones or runs of virtual tokens."""
    words = [word for part in parts for word in part.text.split()]
    if any(part.field for part in parts) or not set(words) <= set(tokenizer.all_special_tokens):
        return None
    return len(words)


def specials(tokenizer: Any) -> tuple[int, int]:
    """How many tokens a tokenizer adds before and behind a text by itself."""
    encoded = _encode(tokenizer, "a")
    own = [i for i, sequence in enumerate(encoded.sequence_ids(0)) if sequence is not None]
    total = len(encoded["input_ids"])
    return (own[0], total - own[-1] - 1) if own else (total, 0)


def _encode(tokenizer: Any, text: str) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for; templates need a fast "
            "tokenizer (tokenizers library)."
        )
    return tokenizer(text, return_offsets_mapping=True, truncation=False)


def fill_template(
    adapter: Adapter,
    tokenizer: Any,
    rows: Sequence[Mapping[str, str]],
    *,
    max_length: int | None = None,
    shorten: str | None = None,
) -> dict[str, Tensor]:
    """Token ids of rows in the template of an adapter, virtual tokens included.

    Each row's text is tokenised as a whole, so words fall into tokens as they do in any text. The ids from the size of
    the embedding table on are the virtual tokens; the model takes them as they are, in rows where this adapter is the
    only one with virtual tokens.

    Args:
        adapter: one with a `PTuning` part.
        tokenizer: the model's, a fast one.
        rows: the fields of each row.
        max_length: most tokens of a row, virtual and special ones counted.
        shorten: the field that is cut at its end where a row is too long; by default the longest.

    Returns:
        `input_ids` and `attention_mask` [B, T], padded on the tokenizer's side.

    Raises:
        MethodError: the adapter has no template. DataError: a field is missing, or a row cannot be shortened enough.
    """
    template, places, first = _template_of(adapter)
    if not rows:
        raise DataError("fill_template() got no rows.")
    filled = [
        fill_row(template, tokenizer, row, first, places=places, max_length=max_length, shorten=shorten, index=index)
        for index, row in enumerate(rows)
    ]
    width = max(len(ids) for ids in filled)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None and any(len(ids) < width for ids in filled):
        raise DataError("the tokenizer has no padding token; set tokenizer.pad_token, for example to its eos_token.")
    left = getattr(tokenizer, "padding_side", "right") == "left"
    ids_BT = torch.full((len(rows), width), pad or 0)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(filled):
        columns = slice(width - len(ids), width) if left else slice(len(ids))
        ids_BT[row, columns] = torch.tensor(ids)
        mask_BT[row, columns] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def _template_of(adapter: Adapter) -> tuple[Template, Places | None, int]:
    """Template and places, and the id of virtual token 0."""
    from inlay.methods.base import VirtualTokens
    from inlay.methods.p_tuning import PTuningTokens
    from inlay.methods.prompt import Borrowed

    everything = zip(adapter.paths, adapter.pieces.values(), strict=True)
    pieces = [(path, piece) for path, piece in everything if isinstance(piece, VirtualTokens)]
    if not any(isinstance(piece, PTuningTokens) for _, piece in pieces):
        raise MethodError(f"fill_template() needs an adapter with a PTuning part, which {adapter.name!r} is not.")
    path, piece = pieces[0]
    if len({id(p) for _, p in pieces if not isinstance(p, Borrowed)}) > 1 or not isinstance(piece, PTuningTokens):
        raise MethodError(
            f"adapter {adapter.name!r} has other virtual tokens beside those of its template, which does not say "
            "where they go. Write all of them into the template."
        )
    table: Any = adapter.model.get_submodule(path)
    return Template(piece.template), piece.places, int(table.num_embeddings)


def fill_row(
    template: Template,
    tokenizer: Any,
    row: Mapping[str, str],
    first: int,
    *,
    places: Places | None = None,
    max_length: int | None = None,
    shorten: str | None = None,
    index: int = 0,
) -> list[int]:
    """The token ids of one row; see `fill_template`.

    Args:
        template, tokenizer, row, max_length, shorten: as there.
        first: the id of virtual token 0, the size of the vocabulary.
        places: where the runs stand, if not where the text says.
        index: the row's number, for messages.

    Raises:
        DataError: a field is missing, or the row cannot be shortened enough.
    """
    row = dict(row)
    while True:
        rendered = template.render(row)
        encoded = _encode(tokenizer, rendered.text)
        excess = 0 if max_length is None else len(encoded["input_ids"]) + template.length - max_length
        if excess <= 0:
            break
        row = _shortened(rendered, encoded, row, excess, shorten, index)
    ids, starts = list(encoded["input_ids"]), _starts(template, rendered, encoded, index)
    if places is not None:
        starts = [at if at >= 0 else len(ids) - ~at for at, _ in places]
    for start, count, number in reversed(list(zip(starts, template.counts, _numbers(template.counts), strict=True))):
        ids[start:start] = range(first + number, first + number + count)
    return ids


def _numbers(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def _starts(template: Template, rendered: Rendered, encoded: Any, index: int) -> list[int]:
    """The token before which each run stands."""
    own = [i for i, sequence in enumerate(encoded.sequence_ids(0)) if sequence is not None]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    behind = own[-1] + 1 if own else len(encoded["input_ids"])
    starts = []
    for character in rendered.groups:
        cut = [i for i in own if offsets[i][0] < character < offsets[i][1]]
        if cut:
            raise DataError(
                f"row {index}: the tokenizer joins the texts before and after {{prompt}} into one token "
                f"{rendered.text[slice(*offsets[cut[0]])]!r}. Put a blank there in template {template.source!r}."
            )
        starts.append(next((i for i in own if offsets[i][0] >= character), behind))
    return starts


def _shortened(
    rendered: Rendered, encoded: Any, row: Mapping[str, str], excess: int, name: str | None, index: int
) -> dict[str, str]:
    """The row with one field cut by at least one token."""
    lengths = {field: end - begin for field, (begin, end) in rendered.fields.items()}
    if name is not None and name not in lengths:
        raise DataError(f"shorten={name!r} is no field of the template: {nearest(name, lengths)}")
    if not lengths:
        raise DataError("the template has no field that could be shortened; raise max_length.")
    name = name or max(lengths, key=lengths.__getitem__)
    begin, end = rendered.fields[name]
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if begin <= a < b <= end]
    if len(inside) <= 1:
        raise DataError(f"row {index} is {excess} tokens too long, and field {name!r} cannot be cut further.")
    kept = rendered.text[begin : encoded["offset_mapping"][inside[max(len(inside) - excess, 1)]][0]].rstrip()
    return {**row, name: kept}
