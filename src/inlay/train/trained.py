"""A finished run taken into use again: its model with its adapter, to evaluate, predict and generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from inlay import folders
from inlay.config import RunConfig
from inlay.data.encode_template import Wording
from inlay.ensembling import Vote, decide, replicated, rows_of
from inlay.errors import CheckpointError, ConfigError, DataError
from inlay.train import models, runfolder
from inlay.train.defaults import kind_of
from inlay.train.evaluate import Evaluator, Run, decode
from inlay.train.generate import Decoding, generate
from inlay.train.loss import forward
from inlay.train.precision import autocast
from inlay.train.session import batches_of, data_spec, open_accelerator, seed_everything
from inlay.train.wording import without_virtual_tokens, wording_of


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
    wording: Wording | None = None
    voters: tuple[str, ...] = ()
    vote: Vote = "majority"

    @property
    def title(self) -> str:
        """The method's name, as in tables."""
        return str(self.adapter.method.title)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes, as in training."""
        return autocast(self.config, self.device)

    def evaluate(self, data: str | None = None) -> dict[str, dict[str, float]]:
        """Metrics on the run's own held-out rows, or on a file of the same form.

        Raises:
            DataError: the file cannot be read as the training data was.
        """
        found = self._measure(data, self.wording, self._run)
        if self.voters and self.vote == "majority":  # votes are no probabilities, and have no loss
            for metrics in found.values():
                metrics.pop("loss", None)
        return found

    def evaluate_base(self, data: str | None = None) -> dict[str, dict[str, float]]:
        """The same of the model without any adapter."""
        import inlay

        wording = None if self.wording is None else without_virtual_tokens(self.wording)
        with inlay.use(self.model, None):
            return self._measure(data, wording, forward)

    def _measure(self, data: str | None, wording: Wording | None, run: Run) -> dict[str, dict[str, float]]:
        sets = self._sets(data, wording)
        task = self.facts.task
        return Evaluator(self.model, sets, self._batches, task, self.tokenizer, self.autocast, run=run).measure_all()

    def _run(self, model: Any, inputs: Mapping[str, Tensor], task: str) -> Any:
        """The model's output; where several adapters vote, their answer as if it were one."""
        if not self.voters:
            return forward(model, inputs, task)
        import inlay

        every = replicated(self.voters, inputs, self.vote)
        with inlay.use(model, rows_of(self.voters, every)):
            decided = decide(forward(model, every, task).logits, len(self.voters), self.vote)
        if self.vote == "mean":
            return SimpleNamespace(logits=decided.log_probs)
        # Shares of the votes; among equals the more probable class, by a trace.
        return SimpleNamespace(logits=(decided.votes + 1e-3 * decided.log_probs.exp()).log())

    def _sets(self, data: str | None, wording: Wording | None) -> dict[str, Any]:
        from inlay.data import prepare, prepare_infer

        config, facts = self.config, self.facts
        if data is None:
            spec = replace(data_spec(config, self.tokenizer, self.model.config), wording=wording)
            prepared = prepare(spec, self.tokenizer, models.kind_of(self.model.config))
            if not prepared.evals:
                raise DataError(f"{self.run} held nothing out; give rows to evaluate on with --data")
            if prepared.labels != facts.labels:
                raise DataError(f"{config.data} has other classes now than when {self.run} was trained")
            return prepared.evals
        if kind_of(facts.task) == "generation":
            asked = config.model_copy(update={"data": data, "eval_data": None, "eval_fraction": 0.0, "weights": None})
            kind = models.kind_of(self.model.config)
            return {
                Path(data).name: prepare(
                    data_spec(asked, self.tokenizer, self.model.config), self.tokenizer, kind
                ).train
            }
        encoded, _ = prepare_infer(
            data,
            self.tokenizer,
            facts.task,
            columns=facts.columns,
            labels=facts.labels,
            multi_label=facts.multi_label,
            max_length=facts.max_length,
            wording=wording,
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
            wording=self.wording,
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
                output = self._run(self.model, batch.inputs, self.facts.task)
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
    run: str | Path,
    *,
    adapter: str | None = None,
    words: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    others: Sequence[str] = (),
    vote: Vote = "majority",
) -> Trained:
    """The model of a run folder with its adapter.

    Args:
        run: the run folder, or a checkpoint in it.
        adapter: another adapter folder than `run/adapter`.
        words: overrides of the configuration (`use_cpu=true`).
        say: told what is going on.
        others: further run or adapter folders of the same model and classes; all of them answer each row together.
        vote: how, see `inlay.ensemble`.

    Raises:
        CheckpointError: this is no run folder, or the run has no adapter yet.
        FormatError: the adapter cannot be read, or belongs to another base.
        ConfigError: the others answer something else.
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
    voters = _voters(model, handle, others, config, facts)
    model.eval()
    wording = wording_of(config, models.kind_of(model.config), tokenizer, model.config)
    return Trained(folder, config, facts, tokenizer, model, handle, device, wording, voters, vote)


def _voters(model: Any, handle: Any, others: Sequence[str], config: RunConfig, facts: Facts) -> tuple[str, ...]:
    """Attach the other adapters; the names of all that vote."""
    import inlay

    if not others:
        return ()
    if facts.task != "sequence-classification" or facts.multi_label:
        raise ConfigError(f"adapters vote for one class of each text; this run does {facts.task}")
    names = [handle.name]
    for number, each in enumerate(others, 2):
        folder = Path(each)
        if (folder / runfolder.MARK).is_file():
            theirs, said = runfolder.read_config(folder), Facts.read(folder)
            if (theirs.template, theirs.verbalizer, said.labels) != (config.template, config.verbalizer, facts.labels):
                raise ConfigError(f"{folder} was trained with another template, verbalizer or other classes")
            folder /= "adapter"
        names.append(inlay.load(model, folder, name=f"voter-{number}").name)
    inlay.use(model, handle.name)
    return tuple(names)
