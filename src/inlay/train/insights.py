"""What a method has found out while training, for the run folder: AdaLoRA's ranks, how far UniPELT's gates are open."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from inlay.folders import replace_text
from inlay.methods.adalora import AdaLoRADelta, rank_map, ranks
from inlay.methods.gated import Gate, plot_gates, record_gates
from inlay.train.loss import forward

BATCHES = 8
"""How many held-out batches gates are recorded on."""


def write(
    run: Path, adapter: Any, batches: Any, task: str, autocast: Callable[[], AbstractContextManager[Any]]
) -> list[str]:
    """Write what there is to tell, as JSON and as a picture; the names of the pictures.

    Args:
        run: the run folder.
        adapter: the trained one, active.
        batches: held-out batches to record gates on; None records none.
        task, autocast: as for the evaluation.
    """
    modules = [module for piece in adapter.pieces.values() for module in piece.modules()]
    pictures = []
    if any(isinstance(module, AdaLoRADelta) for module in modules):
        replace_text(run / "ranks.json", json.dumps(ranks(adapter), indent=1))
        rank_map(adapter, str(run / "ranks.png"))
        pictures.append("ranks.png")
    if batches is not None and any(isinstance(module, Gate) for module in modules):
        adapter.model.eval()
        with torch.no_grad(), autocast(), record_gates(adapter) as values:
            for batch in islice(batches.epoch(0), BATCHES):
                forward(adapter.model, batch.inputs, task)
        means = {name: round(float(torch.cat(seen).mean()), 4) for name, seen in values.items() if seen}
        replace_text(run / "gates.json", json.dumps(means, indent=1))
        plot_gates({name: values[name] for name in means}).savefig(run / "gates.png", dpi=120)
        pictures.append("gates.png")
    return pictures
