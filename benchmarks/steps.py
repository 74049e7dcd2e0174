"""One cell of the benchmark in a fresh process: the training steps of one method at one size, all variants in turn.

    python benchmarks/steps.py '{"method": "lora", "size": "small", "dtype": "float32", "repeats": 7}'

Prints one line of JSON. With "only": a single variant, and its peak memory, as nothing else was in the process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import variants
from limit import limit
from measure import give_back_memory, load, peak_rss, reset_peak_rss, saved_bytes, spread, storages
from variants import RANK, SIZES, Variant


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """All variants of a method in turn: milliseconds of a step and of its parts, bytes kept, losses."""
    size, dtype, method = SIZES[spec["size"]], getattr(torch, spec["dtype"]), spec["method"]
    made: dict[str, Variant] = {}
    for name in variants.NAMES:
        if method == "qlora" and name == "full":
            continue  # a quantised weight is not trained
        try:
            made[name] = variants.make(name, method, size, dtype, spec.get("dropout", 0.0))
        except NotImplementedError:
            continue
    if method == "dora":  # what its extra work is measured against
        made["inlay LoRA"] = variants.make("inlay", "lora", size, dtype, spec.get("dropout", 0.0))
    same = check(made, method, spec.get("dropout", 0.0))
    loads = [load()]
    for _ in range(spec["repeats"] + 1):
        for variant in made.values():
            variant.step()
    loads.append(load())
    found: dict[str, Any] = {"spec": spec, "tokens": size.tokens, "load": max(loads), "variants": {}, **same}
    found["threads"] = torch.get_num_threads()
    for name, variant in made.items():
        parts = {part: times[1:] for part, times in variant.split.items()}
        whole = [sum(times) for times in zip(*parts.values(), strict=True)]
        found["variants"][name] = {
            "step": spread(whole),
            **{part: spread(times) for part, times in parts.items()},
            "loss": variant.loss,
            "saved": saved_bytes(variant.forward, storages(variant.model)),
            "trained": sum(p.numel() for p in variant.model.parameters() if p.requires_grad),
        }
    found["limit"] = limit(size, dtype, RANK if method in ("lora", "dora", "adalora", "qlora") else 0)
    return found


def check(made: dict[str, Variant], method: str, dropout: float) -> dict[str, Any]:
    """That the variants compute the same before anything is timed; LoRA's gradients too."""
    if method in ("prefix", "prompt"):
        return {}  # they start at random
    with torch.no_grad():
        losses = {name: float(v.forward()) for name, v in made.items() if not (dropout and name != "frozen")}
    reference = losses.get("frozen", next(iter(losses.values())))
    for name, loss in losses.items():
        if method == "adalora" and name.startswith("peft"):
            continue  # its loss holds the penalty, which ours adds to the gradient
        if abs(loss - reference) > 0.02 * abs(reference):
            raise RuntimeError(f"{name} starts with loss {loss}, the frozen model with {reference}")
    result: dict[str, Any] = {"start": losses}
    if method == "lora" and not dropout:
        norms = {}
        for name in ("inlay", "peft", "peft best"):
            if name != "inlay":
                variants.copy_lora(made["inlay"], made[name])
            norms[name] = variants.gradient_norm(made[name])
        result["gradient_norms"] = norms
        for name, norm in norms.items():
            if abs(norm - norms["inlay"]) > 0.02 * norms["inlay"]:
                raise RuntimeError(f"gradient norms differ: {name} {norm}, inlay {norms['inlay']}")
    return result


def alone(spec: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one variant above what its process had before the model was made."""
    size, dtype = SIZES[spec["size"]], getattr(torch, spec["dtype"])
    warm = variants.make(spec["only"], spec["method"], SIZES["tiny"], dtype, spec.get("dropout", 0.0))
    warm.step()
    del warm
    gc.collect()
    give_back_memory()
    fixed = reset_peak_rss()
    variant = variants.make(spec["only"], spec["method"], size, dtype, spec.get("dropout", 0.0))
    made = peak_rss() - fixed
    for _ in range(3):
        variant.step()
    return {"spec": spec, "made": made, "peak": peak_rss() - fixed}


def main() -> None:
    spec = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(spec.get("threads", 1))
    print(json.dumps(alone(spec) if "only" in spec else cell(spec)))


if __name__ == "__main__":
    main()
