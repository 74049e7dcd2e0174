"""What a comparison runs: a grid of methods x amounts of training data x seeds over one model and one data set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.config import MethodSetting, RunConfig
from inlay.config_loading import build_method, load, method_name, method_of_words
from inlay.errors import ConfigError

LOW_DATA_EPOCHS = 20
"""Passes over a small sample where the run on all data is measured in epochs; with steps, all sizes get the same."""

NO_CURVE = 10**9
"""Steps between evaluations of runs on samples: before the first and after the last step is enough."""

CHOSEN_HERE = {
    "method": "--methods",
    "seed": "--seeds",
    "output_dir": "--output-dir",
    "resume": "running the same comparison again",
    "allow_changed": "another --output-dir",
    "baseline": "the method headonly",
    "load_best_model_at_end": "nothing: the last adapter is measured, as the best one would be chosen on the rows "
    "that it is measured on",
}
"""Keys of a run configuration that the comparison sets itself, and what decides them instead."""

FIXED: dict[str, Any] = {
    "baseline": False,
    "load_best_model_at_end": False,
    "save_total_limit": 1,
    "eval_samples": 0,
}


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        label: what it is called in tables.
        method: as in a run configuration: a name, a mapping with `name`, or a list of those (a mix).
        settings: keys of the run configuration that differ for this variant alone.
    """

    label: str
    method: MethodSetting
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The method's lower-case name."""
        return method_name(self.method)


@dataclass(frozen=True)
class Cell:
    """One run: a variant, an amount of training data (None is all), a seed."""

    variant: Variant
    size: int | None
    seed: int

    @property
    def name(self) -> str:
        """Its file name."""
        slug = re.sub(r"[^A-Za-z0-9.+=]+", "-", self.variant.label).strip("-.").lower()
        return f"{slug}_{self.size or 'all'}_{self.seed}"

    def alike(self, other: Cell) -> bool:
        """Whether both see the same batches, as far as seed and amount of data decide it."""
        return (self.size, self.seed) == (other.size, other.seed)


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Attributes:
        template: the run configuration that all runs share.
        variants: what is compared.
        seeds: one run each; a seed draws the new weights, the order and the sample of the data.
        sizes: rows to train on; None is all.
        output: the folder of the comparison.
        note: one sentence for the page on how the settings were chosen.
        inference: also measure the time of inference.
        keep_runs: leave the run folders in `runs/`, to look into what was learnt.
        together: train runs side by side in one pass over the base where they can be.
    """

    template: RunConfig
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    output: Path
    sizes: tuple[int | None, ...] = (None,)
    note: str = ""
    inference: bool = True
    keep_runs: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"methods: two rows of the comparison have one name ({', '.join(twice)}); label them apart"
            )
        for size in self.sizes:
            if size is not None and size < 2:
                raise ConfigError(f"sizes: {size} rows teach nothing; give 2 or more, or all")
        if len(self.sizes) > 1 and isinstance(self.template.data, list):
            raise ConfigError("sizes: samples are drawn from one set of data; data names several")

    def cells(self) -> Iterator[Cell]:
        """All runs: first every variant on all data with the first seed, so that an early stop leaves a whole table."""
        for size in sorted(self.sizes, key=lambda size: (size is not None, -(size or 0))):
            for seed in self.seeds:
                for variant in self.variants:
                    yield Cell(variant, size, seed)

    def timed(self, cell: Cell) -> Cell:
        """The run of the same variant from which costs are taken that do not depend on what was learnt."""
        whole = None if None in self.sizes else max(filter(None, self.sizes))
        return Cell(cell.variant, whole, self.seeds[0])

    def times_inference(self, cell: Cell) -> bool:
        """Whether inference is timed after this run: once a variant."""
        return self.inference and cell == self.timed(cell)

    def config(self, cell: Cell, data: str | list[str]) -> RunConfig:
        """The configuration of one run, its folder left open.

        Args:
            cell: which run.
            data: the training data, as the comparison resolved it (see `heldout`).
        """
        values = self.template.model_dump() | FIXED | dict(cell.variant.settings)
        values |= {"method": cell.variant.method, "seed": cell.seed, "data": data}
        if cell.size is not None:
            values["data"] = f"{data}#{cell.size}"
            if values["eval_steps"] is None:
                values["eval_steps"] = NO_CURVE
            if values["max_steps"] < 1:
                values["num_train_epochs"] = max(LOW_DATA_EPOCHS, values["num_train_epochs"])
        return RunConfig.model_validate(values)


def template_of(words: Sequence[str], flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that all runs share, from `key=value` words and flags.

    Raises:
        ConfigError: a key is unknown or wrong, or is one that the comparison sets itself.
    """
    config = load(None, list(words), flags)
    for key in config.model_fields_set & CHOSEN_HERE.keys():
        raise ConfigError(f"{key}: in a comparison this is decided by {CHOSEN_HERE[key]}")
    return config


def variants_of(words: str) -> tuple[Variant, ...]:
    """`lora,lora:rank=2,lora+prefix` as variants; an empty text means every method, full fine-tuning first.

    >>> [v.label for v in variants_of("lora:rank=2,bitfit")]
    ['LoRA rank=2', 'BitFit']
    """
    from inlay.methods.base import methods

    every = sorted(methods(), key=lambda name: (name != "full", name != "headonly"))
    entries = [entry.strip() for entry in words.split(",") if entry.strip()] or every
    return tuple(_variant(entry) for entry in entries)


def _variant(entry: str) -> Variant:
    method = method_of_words(entry, "methods")
    parts = method if isinstance(method, list) else [method]
    names = [_title(build_method(part)) for part in parts]
    extras = [setting for part in entry.split("+") for setting in part.split(":")[1:]]
    return Variant(" ".join(["+".join(names), *extras]), method)


def _title(method: Any) -> str:
    """The class's name; the design space's default cell under the name that the field gives it."""
    return "Parallel adapter" if method == type(method)() and method.tag == "inlay" else type(method).__name__


def sizes_of(text: str) -> tuple[int | None, ...]:
    """`100,500,all` as sizes.

    >>> sizes_of("100,all")
    (100, None)
    """
    sizes: list[int | None] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word != "all" and not word.isdecimal():
            raise ConfigError(f"sizes: expected numbers of rows or 'all', got {word!r}")
        sizes.append(None if word == "all" else int(word))
    if not sizes:
        raise ConfigError("sizes: none were given; as in --sizes 100,500,1000,all")
    return tuple(dict.fromkeys(sizes))
