"""From a file to batches: read strictly, detect the format, tokenize once, mask, batch in a fixed order.

    prepared = prepare(DataSpec("train.csv"), tokenizer, "encoder")
    batches = Batches(prepared.train, 32, seed=42, shuffle=True, pad_token_id=0, task=prepared.task)
    for batch in batches.epoch(0): model(**batch.inputs)

A row goes through `readers` (bytes -> columns), `formats` and `parse` (columns -> record), `encode_*` (record ->
tokens), `store` (tokens on disk), `encoded` (numbered examples), `batches`; `pipeline` runs all of it. Nothing here
imports torch, transformers, datasets or pyarrow before they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.data.batches import Batch, Batches, collate, pad_prompts
    from inlay.data.encoded import Encoded
    from inlay.data.infer import prepare_infer
    from inlay.data.packing import find_layout
    from inlay.data.pipeline import prepare
    from inlay.data.spec import DataSpec, Prepared, Report

_HOMES = {
    "Batch": "batches",
    "Batches": "batches",
    "DataSpec": "spec",
    "Encoded": "encoded",
    "Prepared": "spec",
    "Report": "spec",
    "collate": "batches",
    "find_layout": "packing",
    "pad_prompts": "batches",
    "prepare": "pipeline",
    "prepare_infer": "infer",
}
__all__ = [
    "Batch",
    "Batches",
    "DataSpec",
    "Encoded",
    "Prepared",
    "Report",
    "collate",
    "find_layout",
    "pad_prompts",
    "prepare",
    "prepare_infer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
