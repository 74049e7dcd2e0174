"""What a method costs on this machine: peak memory of a run, and the time of inference beside the bare base."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from inlay.errors import MergeError
from inlay.train.defaults import kind_of
from inlay.train.loss import forward
from inlay.train.trained import Trained

SECONDS = 2.0
"""Time spent on one inference figure; the median of what fits in."""
ROUNDS = (5, 60)
"""Fewest and most repetitions within that time."""
BATCH = 16
NEW_TOKENS = 24


class PeakMemory:
    """The most memory that was in use inside the context beyond what was in use at its start, in bytes.

    On an accelerator what its allocator handed out; on the CPU resident memory by the kernel's own high-water mark
    (Linux), which counts everything: weights, activations, optimizer, kernels' scratch, the files that are mapped.
    `bytes` is None where the system tells nothing of the kind.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        elif (status := _status()) is not None and _reset():
            self._start = (_status() or status)["VmRSS"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._start is None:
            return
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        elif (status := _status()) is not None:
            self.bytes = status["VmHWM"] - self._start


def _status() -> dict[str, int] | None:
    """Resident memory now and at most, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
             if name in ("VmRSS", "VmHWM")}  # fmt: skip
    return found if len(found) == 2 else None


def _reset() -> bool:
    """Give freed memory back to the system and start the high-water mark anew; False where that is not possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def inference(trained: Trained) -> dict[str, Any]:
    """The time of inference for the base, and for the adapter beside it and merged into it relative to the base.

    Base and adapter take turns, and the median of the ratios of neighbours is taken, so that what else the machine does
    weighs on both. Models that write are timed on one prompt: `prefill` up to the first new token, `decode` for each
    token after it. Others are timed on a batch of 16 held-out rows and on one row.

    Returns:
        figure -> {"base": milliseconds, "unmerged": ratio, "merged": ratio}; "merged" is absent and "not_merged" gives
        the reason where the method cannot be merged.
    """
    import inlay

    model, adapter = trained.model, trained.adapter
    tasks = _generating(trained) if kind_of(trained.facts.task) == "generation" else _reading(trained)
    result: dict[str, Any] = {}
    inlay.use(model, adapter.name)
    for figure, run in tasks.items():
        base, ratio = _turns(run, lambda: inlay.use(model, None), lambda: inlay.use(model, adapter.name), len(tasks))
        result[figure] = {"base": base, "unmerged": ratio}
    try:
        adapter.merge()
    except MergeError as error:
        return result | {"not_merged": str(error)}

    def apart() -> None:
        adapter.unmerge()
        inlay.use(model, None)

    def together() -> None:
        inlay.use(model, adapter.name)
        adapter.merge()

    for figure, run in tasks.items():
        _, result[figure]["merged"] = _turns(run, apart, together, len(tasks))
    adapter.unmerge()
    inlay.use(model, adapter.name)
    return result


def _turns(
    run: Callable[[], float], to_base: Callable[[], object], to_adapter: Callable[[], object], figures: int
) -> tuple[float, float]:
    """Median milliseconds of the base, and the median ratio of adapter to base. Ends with the adapter in place."""
    base: list[float] = []
    ratios: list[float] = []
    began = time.perf_counter()
    while len(base) < ROUNDS[0] or (time.perf_counter() - began < SECONDS / figures and len(base) < ROUNDS[1]):
        to_base()
        run()  # plans, buffers and caches are made before the clock runs
        base.append(run())
        to_adapter()
        run()
        ratios.append(run() / base[-1])
    return statistics.median(base), statistics.median(ratios)


def _reading(trained: Trained) -> dict[str, Callable[[], float]]:
    """Forward passes over held-out rows."""
    batch = _held_out(trained, BATCH)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    return {
        f"batch {len(next(iter(batch.values())))}": lambda: _timed(trained, batch),
        "one row": lambda: _timed(trained, one),
    }


def _timed(trained: Trained, inputs: dict[str, torch.Tensor]) -> float:
    began = _now(trained)
    with torch.no_grad(), trained.autocast():
        forward(trained.model, inputs, trained.facts.task)
    return 1000 * (_now(trained) - began)


def _generating(trained: Trained) -> dict[str, Callable[[], float]]:
    """The first token after a prompt, and each token after that."""
    inputs = {n: t[:1] for n, t in _held_out(trained, 1).items() if n in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    limit = getattr(trained.model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and not trained.model.config.is_encoder_decoder:
        length = max(1, min(length, limit - NEW_TOKENS - 64))  # 64: room for virtual tokens
        inputs = {n: t[:, :length] for n, t in inputs.items()}

    def write(count: int) -> float:
        began = _now(trained)
        with torch.no_grad(), trained.autocast():
            trained.model.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=trained.tokenizer.pad_token_id,
            )  # fmt: skip
        return 1000 * (_now(trained) - began)

    return {
        "prefill": lambda: write(1),
        "decode": lambda: (write(NEW_TOKENS + 1) - write(1)) / NEW_TOKENS,
    }


def _now(trained: Trained) -> float:
    if trained.device.type == "cuda":
        torch.cuda.synchronize(trained.device)
    return time.perf_counter()


def _held_out(trained: Trained, rows: int) -> dict[str, torch.Tensor]:
    """The first batch of the held-out rows."""
    from inlay.data import prepare
    from inlay.train import models
    from inlay.train.session import batches_of, data_spec

    config = trained.config.model_copy(update={"per_device_eval_batch_size": rows})
    model_config = trained.model.config
    spec = data_spec(config, trained.tokenizer, model_config)
    prepared = prepare(spec, trained.tokenizer, models.kind_of(model_config))
    encoded = next(iter(prepared.evals.values()), prepared.train)
    batches = batches_of(encoded, config, trained.tokenizer, trained.facts.task, trained.device, train=False)
    inputs: dict[str, torch.Tensor] = batches.batch(0, len(batches) // 2).inputs
    return inputs
