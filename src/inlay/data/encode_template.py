"""Records with a class into the words of a template, for language models that answer with a word.

`"{text} It was {mask}."` makes a cloze of a text (PET, arXiv:2001.07676); runs of virtual tokens may stand in it
(P-tuning, arXiv:2103.10385). Which words stand for the classes is the business of `inlay.data.batches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inlay.data.examples import Example, specials
from inlay.data.rows import Labelled, Record, RowError
from inlay.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wording:
    """How texts are put to a language model.

    Attributes:
        template: the text around the fields, see `inlay.Template`; with the tokenizer's own mask token, if any.
        first: the id of virtual token 0, the size of the vocabulary.
        goes_on: the model answers behind the text, so what the tokenizer puts there is left out.
    """

    template: str
    first: int
    goes_on: bool


class TemplateEncoder:
    """A template with one or two texts, and a class. Of a row that is too long the longest field loses its end.

    Raises:
        DataError: the template names a field that the rows have not, or leaves a text out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, wording: Wording, roles: Mapping[str, str]
    ) -> None:
        from inlay.template import Template

        self.names: dict[str, int] = {}
        self.several = False
        self._tokenizer, self._max_length, self._wording = tokenizer, max_length, wording
        self._template = Template(wording.template, bare=True)
        self._fields = {role: (role, roles[role]) for role in ("text", "text_pair") if role in roles}
        known = [name for names in self._fields.values() for name in names]
        unknown = [field for field in self._template.fields if field not in known]
        if unknown:
            there = nearest(unknown[0], known)
            raise DataError(f"the template has a field {{{unknown[0]}}}, and the rows have no such text: {there}")
        for role, names in self._fields.items():
            if not set(names) & set(self._template.fields):
                raise DataError(
                    f"the template leaves out {{{names[0]}}}, column {roles[role]!r}: write it where it goes"
                )
        self._behind = len(specials(tokenizer)[1]) if wording.goes_on else 0

    def __call__(self, records: Sequence[Record]) -> list[list[Example] | RowError]:
        return [self._encode(record) for record in records if isinstance(record, Labelled)]

    def _encode(self, record: Labelled) -> list[Example] | RowError:
        from inlay.template import fill_row

        values = {"text": record.text, "text_pair": record.pair or ""}
        row = {name: values[role] for role, names in self._fields.items() for name in names}
        first, room = self._wording.first, self._max_length + self._behind
        try:
            whole = fill_row(self._template, self._tokenizer, row, first)
            ids = (
                whole if len(whole) <= room else fill_row(self._template, self._tokenizer, row, first, max_length=room)
            )
        except DataError as error:
            return RowError(f"a row that fits its template ({error})", value=record.text)
        example = Example(ids[: len(ids) - self._behind], cut=len(whole) - len(ids))
        if record.label is not None:
            labels = (record.label,) if isinstance(record.label, str) else record.label
            self.several |= not isinstance(record.label, str)
            example.labels = [self.names.setdefault(label, len(self.names)) for label in labels]
            example.references = list(labels)
        return [example]
