"""Rows to predict or generate for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inlay.data.encode_template import Wording
from inlay.data.encoded import Encoded
from inlay.data.encoding import encoder_for, format_of, making_of, max_length_of
from inlay.data.formats import ANSWERING, KINDS, REGRESSION, SEQUENCE, TOKEN, Format, checked_task
from inlay.data.labels import Labels
from inlay.data.readers import InMemory, Reader
from inlay.data.rows import BadRows
from inlay.data.sources import Reading, open_source
from inlay.data.spec import default_cache_dir
from inlay.data.store import in_memory
from inlay.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_infer(
    rows: str | Path | Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    columns: Mapping[str, str] | None = None,
    labels: list[str] | None = None,
    multi_label: bool = False,
    max_length: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    skipped_file: Path | None = None,
    wording: Wording | None = None,
) -> tuple[Encoded, str]:
    """Rows to predict or generate for; nothing to learn need be in them.

    Args:
        rows: a file (text files: one row per line), or rows: texts, pairs of texts, lists of words, or mappings.
        tokenizer: the model's.
        task: what the model does.
        columns: role -> column as in training (`Prepared.columns`); roles that predict nothing may be missing.
        labels: the classes of the model, to number those that the rows have; unknown ones are errors.
        multi_label: whether a text can have several of them, as in training (`Prepared.multi_label`).
        max_length: most tokens of a row, as in training.
        on_bad_row: `skip` needs `skipped_file`, where such rows are written.
        skipped_file: that file.
        wording: how texts are put to a language model, as in training.

    Returns:
        The examples (`prompt_ids(i)`, `origin(i)`; `reference(i)` where the rows say what is right; `labelled` where
        all do), and what was detected, in words.

    Raises:
        DataError: as `prepare` does.
    """
    task = checked_task(task) or ""
    if on_bad_row == "skip" and skipped_file is None:
        raise DataError("on_bad_row=skip needs a file to write the skipped rows to (skipped_file)")
    reader = _infer_reader(rows, task, columns or {})
    form = _form(reader, task, columns)
    length = max_length_of(max_length, tokenizer)
    encoder = encoder_for(form, tokenizer, length, targets=False, one_each=True, wording=wording)
    for name in labels or []:
        encoder.names.setdefault(name, len(encoder.names))
    making = making_of(reader, form, encoder, BadRows(on_bad_row, skipped_file), lambda *_: None, targets=False)
    store = in_memory(making)
    unknown = [name for name in making.names if labels is not None and name not in labels]
    if unknown and task in (SEQUENCE, TOKEN):
        hint = nearest(unknown[0], labels or [])
        raise DataError(f"{reader.name} has the label {unknown[0]!r}, which the model does not know ({hint})")
    store.names = list(making.names)
    return Encoded([store], form.task, Labels(labels, multi_label), length), str(form)


def _form(reader: Reader, task: str, columns: Mapping[str, str] | None) -> Format:
    """The format with its targets where the rows have them, else without."""
    try:
        form = format_of(reader, None, task, columns)
        if KINDS[form.kind].targets:
            return form
    except DataError:
        pass
    return format_of(reader, None, task, columns, targets=False)


def _infer_reader(rows: str | Path | Sequence[Any], task: str, columns: Mapping[str, str]) -> Reader:
    if isinstance(rows, (str, Path)):
        return open_source(str(rows), Reading(documents=False, seed=0, cache_dir=default_cache_dir())).train
    by_default = "tokens" if task == TOKEN else "text" if task in (SEQUENCE, REGRESSION) else "prompt"
    text = next((columns[role] for role in ("text", "prompt", "instruction", "tokens") if role in columns), by_default)
    shaped: list[Any] = []
    for row in rows:
        if isinstance(row, str) and "messages" in columns:
            shaped.append({columns["messages"]: [{"role": "user", "content": row}]})
        elif isinstance(row, str):
            shaped.append({text: row})
        elif isinstance(row, Mapping):
            shaped.append(dict(row))
        elif task == TOKEN:
            shaped.append({columns.get("tokens", "tokens"): list(row)})
        elif row and isinstance(row[0], Mapping):
            shaped.append({columns.get("messages", "messages"): list(row)})
        else:
            first, second = ("question", "context") if task == ANSWERING else ("text", "text_pair")
            shaped.append(dict(zip((columns.get(first, first), columns.get(second, second)), row, strict=True)))
    return InMemory(shaped)
