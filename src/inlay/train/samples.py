"""Texts generated while training: the same few held-out prompts at each evaluation, so that progress can be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from inlay.folders import append_text
from inlay.train import metrics
from inlay.train.distributed import is_sharded
from inlay.train.generate import Decoding, generate
from inlay.train.narrate import Narrator, escape
from inlay.train.signals import StopRequest

Autocast = Callable[[], AbstractContextManager[Any]]


class Samples:
    """Generates for the first prompts of one held-out set and appends them to `samples.jsonl`.

    Args:
        model, tokenizer, autocast, decoding: see `generate`.
        name, encoded: the set.
        count: how many prompts.
        path: the file; None writes nothing.
        narrator: shows the first text.
        stop: a signal ends the writing at the next token, and nothing of it is kept: the evaluation is made again.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        encoded: Any,
        count: int,
        decoding: Decoding,
        autocast: Autocast,
        path: Path | None,
        narrator: Narrator,
        stop: StopRequest | None = None,
    ) -> None:
        self.model, self.tokenizer, self.decoding, self.autocast = model, tokenizer, decoding, autocast
        self.name, self.encoded, self.path, self.narrator = name, encoded, path, narrator
        self.prompts = encoded.prompts()[:count]
        self.stop = stop or StopRequest()

    def write(self, step: int, name: str) -> None:
        """Generate after an evaluation of the set `name` at `step`."""
        if name != self.name or (self.path is None and not is_sharded(self.model)):
            return
        prompts = [self.encoded.prompt_ids(index) for index, _ in self.prompts]
        # Weights that are gathered from all processes are gathered by all, so that none may leave before the others.
        stopped = None if is_sharded(self.model) else lambda: self.stop.signum is not None
        written = generate(self.model, self.tokenizer, prompts, self.decoding, autocast=self.autocast, stopped=stopped)
        texts = dict(written)
        if self.path is None or (stopped is not None and stopped()):
            return  # it took part in the forward passes, another process writes; or the evaluation ends here
        lines = []
        for position, (index, references) in enumerate(self.prompts):
            record = {
                "step": step,
                "origin": self.encoded.origin(index),
                "prompt": self.tokenizer.decode(prompts[position], skip_special_tokens=True),
                "reference": references[0] if references else None,
                "generated": texts[position],
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        try:
            append_text(self.path, "".join(lines))
        except OSError as error:
            self.narrator.fact(
                "samples", f"[bold red]those of step {step} could not be written: {escape(str(error))}[/]"
            )
        prompt = self.tokenizer.decode(prompts[0], skip_special_tokens=True)
        self.narrator.fact("sample", f"[dim]{escape(_short(prompt))}[/] -> {escape(_short(texts[0]))}")


def generation_metrics(
    model: Any, tokenizer: Any, encoded: Any, count: int, decoding: Decoding, autocast: Autocast
) -> dict[str, float]:
    """Exact match, BLEU and ROUGE over the first `count` distinct prompts, each against all of its references."""
    chosen = [(index, references) for index, references in encoded.prompts() if references][:count]
    prompts = [encoded.prompt_ids(index) for index, _ in chosen]
    texts = dict(generate(model, tokenizer, prompts, decoding, autocast=autocast))
    return metrics.generation([texts[i] for i in range(len(chosen))], [references for _, references in chosen])


def _short(text: str, width: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
