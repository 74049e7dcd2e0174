"""A finished run taken into use again: its model with its adapter, to evaluate, predict and generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlay import folders
from inlay.config import RunConfig
from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.train import models, runfolder
from inlay.train.defaults import kind_of
from inlay.train.evaluate import Evaluator, decode
from inlay.train.generate import Decoding, generate
from inlay.train.loss import forward
from inlay.train.narrate import title_of
from inlay.train.precision import autocast
from inlay.train.session import batches_of, data_spec, open_accelerator, seed_everything


@dataclass(frozen=True)
class Facts:
    """What `data.json` keeps of the training data, as far as later rows must be read alike."""

    task: str
    labels: list[str] | None
    multi_label: bool
    columns: dict[str, str]
    max_length: int

    @classmethod
    def read(cls, run: Path) -> Facts:
        """From a run folder."""
        values = folders.read_json(run / "data.json")
        try:
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise CheckpointError(f"{run / 'data.json'} lacks {error}") from None


@dataclass
class Trained:
    """A run's model with its adapter in eval mode."""

    run: Path
    config: RunConfig
    facts: Facts
    tokenizer: Any
    model: Any
    adapter: Any
    device: torch.device

    @property
    def title(self) -> str:
        """The method's name, as in tables."""
        return title_of(self.adapter.method)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes, as in training."""
        return autocast(self.config, self.device)

    def evaluate(self, data: str | None = None) -> dict[str, dict[str, float]]:
        """Metrics on the run's own held-out rows, or on a file of the same form.

        Raises:
            DataError: the file cannot be read as the training data was.
        """
        evaluator = Evaluator(
            self.model, self._sets(data), self._batches, self.facts.task, self.tokenizer, self.autocast
        )
        return evaluator.measure_all()

    def _sets(self, data: str | None) -> dict[str, Any]:
        from inlay.data import prepare, prepare_infer

        config, facts = self.config, self.facts
        if data is None:
            prepared = prepare(data_spec(config), self.tokenizer, models.kind_of(self.model.config))
            if not prepared.evals:
                raise DataError(f"{self.run} held nothing out; give rows to evaluate on with --data")
            if prepared.labels != facts.labels:
                raise DataError(f"{config.data} has other classes now than when {self.run} was trained")
            return prepared.evals
        if kind_of(facts.task) == "generation":
            asked = config.model_copy(update={"data": data, "eval_data": None, "eval_fraction": 0.0, "weights": None})
            kind = models.kind_of(self.model.config)
            return {Path(data).name: prepare(data_spec(asked), self.tokenizer, kind).train}
        encoded, _ = prepare_infer(
            data,
            self.tokenizer,
            facts.task,
            columns=facts.columns,
            labels=facts.labels,
            multi_label=facts.multi_label,
            max_length=facts.max_length,
        )
        if not encoded.labelled:
            raise DataError(f"{data} has no labels to compare with; use inlay predict")
        return {Path(data).name: encoded}

    def _batches(self, encoded: Any) -> Any:
        return batches_of(encoded, self.config, self.tokenizer, self.facts.task, self.device, train=False)

    def encode(self, rows: str | Sequence[Any]) -> Any:
        """Rows to predict or generate for: a file, or the rows themselves."""
        from inlay.data import prepare_infer

        facts = self.facts
        encoded, _ = prepare_infer(
            rows,
            self.tokenizer,
            facts.task,
            columns=facts.columns,
            labels=facts.labels,
            multi_label=facts.multi_label,
            max_length=facts.max_length,
        )
        return encoded

    def predict(self, rows: str | Sequence[Any], top: int = 1) -> Iterator[dict[str, Any]]:
        """What the model says for each row, in order: `label` and `score`, `labels`, `value`, `tags` or `answer`.

        Args:
            rows: a file, or texts, pairs of texts, lists of words.
            top: how many classes to name, most likely first.

        Raises:
            ConfigError: the model writes texts; `generate` is what to call.
        """
        if kind_of(self.facts.task) == "generation":
            raise ConfigError(f"{self.run} writes text; use: inlay generate {self.run}")
        encoded = self.encode(rows)
        found: dict[int, dict[str, Any]] = {}
        for batch in self._batches(encoded).epoch(0):
            with torch.no_grad(), self.autocast():
                output = forward(self.model, batch.inputs, self.facts.task)
            said = self._said(output, batch, encoded, top)
            found |= {int(i): one for i, one in zip(batch.indices, said, strict=True)}
        for index in range(len(encoded)):
            yield {"origin": encoded.origin(index), **found[index]}

    def _said(self, output: Any, batch: Any, encoded: Any, top: int) -> list[dict[str, Any]]:
        task, labels = self.facts.task, self.facts.labels or []
        if task == "sequence-classification" and not self.facts.multi_label:
            probabilities = output.logits.float().softmax(-1)
            best = probabilities.topk(min(top, len(labels)), dim=-1)
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            return [
                {"label": labels[where[0]], "score": round(values[0], 4)}
                | ({"top": {labels[i]: round(v, 4) for v, i in zip(values, where, strict=True)}} if top > 1 else {})
                for values, where in rows
            ]
        decoded = decode(output, batch.inputs, task, encoded, batch.indices, self.tokenizer)
        if task == "sequence-classification":
            return [{"labels": [labels[i] for i, on in enumerate(row) if on]} for row in decoded]
        name = {"regression": "value", "token-classification": "tags", "question-answering": "answer"}[task]
        return [{name: value} for value in decoded]

    def generate(self, rows: str | Sequence[Any], decoding: Decoding, batch: int = 16) -> list[dict[str, Any]]:
        """A text for each prompt, in order: `origin`, `prompt`, `generated`.

        Raises:
            ConfigError: the model classifies; `predict` is what to call.
        """
        if kind_of(self.facts.task) != "generation":
            raise ConfigError(f"{self.run} does {self.facts.task}; use: inlay predict {self.run}")
        encoded = self.encode(rows)
        prompts = [self._prompt(encoded, index) for index in range(len(encoded))]
        texts = dict(generate(self.model, self.tokenizer, prompts, decoding, batch=batch, autocast=self.autocast))
        return [
            {
                "origin": encoded.origin(index),
                "prompt": self.tokenizer.decode(prompts[index], skip_special_tokens=True),
                "generated": texts[index],
            }
            for index in range(len(encoded))
        ]

    def _prompt(self, encoded: Any, index: int) -> list[int]:
        """The tokens to go on from. Of running text that is all of it, without an end token."""
        if "prompt" in self.facts.columns or self.facts.task == "seq2seq" or "text" not in self.facts.columns:
            return list(encoded.prompt_ids(index))
        ids = list(encoded[index]["input_ids"])
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids


def open_trained(
    run: str | Path, *, adapter: str | None = None, words: Sequence[str] = (), say: Callable[[str], None] | None = None
) -> Trained:
    """The model of a run folder with its adapter.

    Args:
        run: the run folder, or a checkpoint in it.
        adapter: another adapter folder than `run/adapter`.
        words: overrides of the configuration (`use_cpu=true`).
        say: told what is going on.

    Raises:
        CheckpointError: this is no run folder, or the run has no adapter yet.
        FormatError: the adapter cannot be read, or belongs to another base.
    """
    import inlay

    folder = Path(run)
    if folder.name.startswith("checkpoint-") and (folder / "state.json").exists():
        adapter, folder = adapter or str(folder / "adapter"), folder.parent
    config = runfolder.read_config(folder, list(words))
    facts = Facts.read(folder)
    path = Path(adapter) if adapter else folder / "adapter"
    if not path.is_dir():
        raise CheckpointError(f"{path} is missing: the run has not ended. Resume it: inlay train --resume {folder}")
    device = open_accelerator(config).device
    tokenizer = models.load_tokenizer(config)
    if say is not None:
        say(f"loading {config.model} with {path}")
    seed_everything(config.seed)  # what the checkpoint lacks is drawn as it was in training
    model = models.load_model(config, facts, tokenizer, device).model
    handle = inlay.load(model, path)
    model.eval()
    return Trained(folder, config, facts, tokenizer, model, handle, device)
