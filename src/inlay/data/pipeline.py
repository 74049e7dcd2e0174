"""From a `DataSpec` to encoded examples: open, detect, read strictly, tokenize once, hold out, report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inlay.data.encoded import Encoded, Mixture
from inlay.data.encoding import (
    Coverage,
    Progress,
    encoder_for,
    format_of,
    making_of,
    max_length_of,
    records_of,
    sample_of,
)
from inlay.data.formats import CAUSAL, Format, ModelKind, checked_task
from inlay.data.labels import check_known, labels_of
from inlay.data.lazy import LazyStore
from inlay.data.parse import parse
from inlay.data.readers import Reader, names_of
from inlay.data.rows import BadRows, Labelled, names_in
from inlay.data.sources import Reading, open_source
from inlay.data.spec import DataSpec, Prepared, Report, default_cache_dir, merged_notes
from inlay.data.splits import hold_out
from inlay.data.store import Making, Store, open_or_make, store_key, tokenizer_hash
from inlay.data.text_readers import PIECE
from inlay.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES_PER_TOKEN = 3
"""How running text is cut into rows when streaming: so many bytes per token of `max_length`."""


def prepare(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    model_kind: ModelKind,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check, tokenize and split the data of a run.

    Args:
        spec: what to read, and how.
        tokenizer: the model's.
        model_kind: decides the task where `spec` does not: an encoder classifies, the others write.
        progress: called with (what, done, total) while rows are read and tokenized.

    Returns:
        Examples to train and evaluate on, and a report. The same spec and files give the same examples, in the same
        order.

    Raises:
        DataError: a file is not there, of no known form or of two; rows are bad (all of the first twenty are named);
            classes of evaluation rows are unknown; or nothing is left to learn.
    """
    names = [spec.data] if isinstance(spec.data, str) else list(spec.data)
    if not names:
        raise DataError("data is empty; expected a file, a folder or a hub name")
    if spec.weights is not None and (len(spec.weights) != len(names) or min(spec.weights) <= 0):
        raise DataError(f"weights are {spec.weights} for {len(names)} sets of data; expected a number above 0 for each")
    if spec.packing and spec.streaming:
        raise DataError("packing needs the length of every example, which streaming does not know; choose one of them")
    if not 0 <= spec.eval_fraction < 1:
        raise DataError(f"eval_fraction is {spec.eval_fraction}; expected 0 or more and less than 1")
    preparation = _Preparation(spec, tokenizer, model_kind, progress or (lambda what, done, total: None))
    return preparation.run(names)


@dataclass
class _Source:
    """One set of rows on its way."""

    name: str
    reader: Reader
    form: Format
    store: Store
    key: str


class _Preparation:
    """The steps of `prepare`, and what they share."""

    def __init__(
        self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, model_kind: ModelKind, progress: Progress
    ) -> None:
        self.spec, self.tokenizer, self.model_kind, self.progress = spec, tokenizer, model_kind, progress
        self.cache_dir = Path(spec.cache_dir or default_cache_dir())
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the cache folder {self.cache_dir} cannot be made: {error.strerror or error}") from error
        self.max_length = max_length_of(spec.max_length, tokenizer, spec.positions)
        self.report = Report(max_length=self.max_length)
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.notes: list[str] = []
        if "strftime_now" in str(getattr(tokenizer, "chat_template", None)):
            self.notes.append(
                "the chat template writes the date into prompts: the tokens are those of the day they were made"
            )
        task = checked_task(spec.task, model_kind)
        documents = task == CAUSAL or (task is None and model_kind == "decoder")
        piece = max(64, BYTES_PER_TOKEN * self.max_length) if spec.streaming else PIECE
        self.reading = Reading(documents=documents, seed=spec.seed, cache_dir=self.cache_dir, piece=piece)

    def run(self, names: list[str]) -> Prepared:
        """The steps in order."""
        spec = self.spec
        opened = [open_source(name, self.reading) for name in names]
        train = [self._source(names[0], opened[0].train, None)]
        form = train[0].form
        train += [self._source(name, each.train, form) for name, each in zip(names[1:], opened[1:], strict=True)]
        own = [(name, each.held_out) for name, each in zip(names, opened, strict=True) if each.held_out is not None]
        eval_sources = self._eval_sources(form, own)
        stores = [source.store for source in train]
        task, labels = labels_of(form, checked_task(spec.task), stores, train[0].reader.name)
        encoded = Encoded(stores, task, labels, self.max_length, packing=spec.packing)
        if spec.weights is not None:
            encoded.mixture = self._mixture(names, encoded, spec.weights)
        evals = {}
        for name, sources in eval_sources.items():
            check_known(labels, [source.store for source in sources], name)
            evals[name] = Encoded([source.store for source in sources], task, labels, self.max_length)
        split = ""
        if not evals and spec.eval_fraction > 0:
            encoded, held_out, split = self._hold_out(encoded, form)
            evals = {"eval": held_out} if held_out is not None else {}
        if not len(encoded):
            raise DataError(f"{', '.join(names)}: no row is left to learn from")
        self.report.measure(encoded)
        self.report.notes += merged_notes(self.notes)
        keys = [source.key for source in train] + [s.key for sources in eval_sources.values() for s in sources]
        return Prepared(
            task=task,
            format=str(replace(form, task=task)),
            labels=labels.names,
            train=encoded,
            evals=evals,
            report=self.report,
            multi_text=form.multi_text,
            multi_label=labels.several,
            columns=form.roles,
            fingerprint=sha256(repr((keys, split, spec.weights, spec.packing, labels.names)).encode()).hexdigest(),
        )

    def _eval_sources(self, form: Format, own: list[tuple[str, Reader]]) -> dict[str, list[_Source]]:
        given = self.spec.eval_data
        if given is None:
            sources = [self._source(f"{name} (evaluation)", reader, form) for name, reader in own]
            return {"eval": sources} if sources else {}
        if isinstance(given, str):
            named = {"eval": [given]}
        elif isinstance(given, Mapping):
            named = {name: [path] for name, path in given.items()}
        else:
            named = {Path(path).stem if len(given) > 1 else "eval": [path] for path in given}
            if len(named) < len(given):
                raise DataError("two of the eval_data have the same name; give them as name: path")
        return {
            name: [self._source(path, open_source(path, self.reading).train, form) for path in paths]
            for name, paths in named.items()
        }

    def _source(self, name: str, reader: Reader, like: Format | None) -> _Source:
        """Detect and encode one source; with `like`, read as that one was where its columns are there too."""
        columns, task = self.spec.columns, self.spec.task
        if like is not None:
            task = like.task
            if set(like.roles.values()) <= set(getattr(reader, "columns", None) or names_of(sample_of(reader))):
                columns = like.roles
        form = format_of(reader, self.model_kind, task, columns)
        if self.spec.packing and form.task != CAUSAL:
            raise DataError(f"packing puts texts for {CAUSAL} together; the task is {form.task}. Set packing to false.")
        if like is not None and form.multi_text != like.multi_text:
            raise DataError(
                f"{reader.name} and the first set of data differ: one has pairs of texts, the other has not"
            )
        key = store_key(
            name=reader.name,
            rows=reader.fingerprint(),
            form=[form.kind, form.roles, form.task, *([self.spec.wording] if self.spec.wording else [])],
            tokenizer=self.tokenizer_hash,
            max_length=self.max_length,
            on_bad_row=self.spec.on_bad_row,
            piece=self.reading.piece,
        )
        store = self._lazy(reader, form) if self.spec.streaming else self._store(reader, form, key)
        if store.counts.rows == 0:
            raise DataError(f"{name} holds no rows")
        if len(store) == 0:
            raise DataError(
                f"{name} has no good row among its {store.counts.rows}; the first bad ones are in {self._skipped(key)}"
            )
        title = reader.name if reader.name not in self.report.sets else name
        self.report.sets[title] = store.counts
        self.notes += [f"{reader.name}: {note}" for note in reader.notes]
        return _Source(name, reader, form, store, key)

    def _skipped(self, key: str) -> Path:
        return self.cache_dir / key / "skipped.jsonl"

    def _store(self, reader: Reader, form: Format, key: str) -> Store:
        def make(folder: Path) -> Making:
            bad = BadRows(self.spec.on_bad_row, folder / "skipped.jsonl")
            encoder = encoder_for(form, self.tokenizer, self.max_length, wording=self.spec.wording)
            return making_of(reader, form, encoder, bad, self.progress, coverage=Coverage(self.tokenizer))

        store, happened = open_or_make(self.cache_dir / key, make)
        if happened == "rebuilt":
            self.notes.append(
                f"{reader.name}: the tokenized data in {self.cache_dir / key} was damaged and is made anew"
            )
        if store.counts.skipped:
            self.report.skipped_files.append(self._skipped(key))
        return store

    def _lazy(self, reader: Reader, form: Format) -> Store:
        skipped = self.cache_dir / f"skipped-{os.getpid()}-{reader.name.replace('/', '-')}.jsonl"
        skipped.unlink(missing_ok=True)
        bad = BadRows(self.spec.on_bad_row, skipped)
        encoder = encoder_for(form, self.tokenizer, self.max_length, one_each=True, wording=self.spec.wording)
        coverage = Coverage(self.tokenizer)
        rows, several = [], False
        for number, record in records_of(reader, form, bad, self.progress, "checking"):
            rows.append(number)
            coverage.see(record, f"{reader.file(number)}:{reader.line(number)}")
            for name in names_in(record):
                encoder.names.setdefault(name, len(encoder.names))
            several |= isinstance(record, Labelled) and isinstance(record.label, tuple)
        bad.raise_if_any()
        if bad.count:
            self.report.skipped_files.append(skipped)
        store = LazyStore(reader, np.asarray(rows, np.int64), lambda i: parse(reader.row(i), form), encoder, bad)
        coverage.tell(store.counts)
        store.counts.several = several
        return store

    def _mixture(self, names: list[str], encoded: Encoded, weights: list[float]) -> Mixture:
        sizes = [len(store) for store in encoded.stores]
        shares = tuple(weight / sum(weights) for weight in weights)
        for name, size, share in zip(names, sizes, shares, strict=True):
            count = round(share * len(encoded))
            self.notes.append(f"{name}: {share:.0%} of an epoch, {count:,} of its {size:,} examples at a time")
        return Mixture(shares, np.repeat(np.arange(len(sizes)), sizes))

    def _hold_out(self, encoded: Encoded, form: Format) -> tuple[Encoded, Encoded | None, str]:
        """Rows are held out whole; of running text, which is few rows, windows are."""
        spec = self.spec
        groups = np.arange(len(encoded)) if form.kind == "document" else encoded.groups()
        train, held = hold_out(groups, encoded.strata(), spec.eval_fraction, spec.seed)
        if not len(held):
            self.notes.append("nothing is held out: there are too few rows")
            return encoded, None, ""
        part = f"{len(held):,} of {len(encoded):,} examples ({spec.eval_fraction:.0%})"
        split = f"{part} are held out, drawn with seed {spec.seed}"
        self.notes.append(split)
        held_out = encoded.select(held)
        held_out.packing, held_out.mixture = False, None
        return encoded.select(train), held_out, split
