"""What is paid once: attaching, saving, loading, merging, switching, importing; and one row through one projection.

    python benchmarks/moments.py '{"what": "handling", "repeats": 5}'
    python benchmarks/moments.py '{"what": "one row", "repeats": 30}'
    python benchmarks/moments.py '{"what": "imports", "repeats": 5}'

Prints one line of JSON. The model for the handling is a Llama of 24 layers with 168 projections.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure import in_turn, load, spread

DEPTH = 24
ADAPTERS = 4


def handling(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each act, inlay's and PEFT's in turn, on fresh copies of one model."""
    import peft
    import torch
    from variants import ALPHA, RANK, TARGETS, Size, base

    import inlay

    torch.set_num_threads(spec.get("threads", 1))
    model = base(Size(64, 176, DEPTH, 4, 4, 256, 1, 16), torch.float32).eval()
    ids = torch.randint(0, 256, (1, 16))
    times: dict[str, list[float]] = {}

    def timed(what: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = act()
        times.setdefault(what, []).append((time.perf_counter() - start) * 1e3)
        return result

    def inlays(root: Path) -> None:
        net = copy.deepcopy(model)
        method = inlay.LoRA(rank=RANK, alpha=ALPHA)
        first = timed("inlay: attach, anatomy unknown", lambda: inlay.attach(net, method, "a0"))
        for i in range(1, ADAPTERS):
            timed(f"inlay: attach adapter {i + 1}", lambda i=i: inlay.attach(net, method, f"a{i}"))
        timed("inlay: switch", lambda: inlay.use(net, "a0"))
        for parameter in first.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        timed("inlay: save, with fsync", lambda: first.save(root / "inlay"))
        with torch.no_grad():
            before = net(input_ids=ids).logits
        inlay.detach(net)
        timed("inlay: load, anatomy known", lambda: inlay.load(net, root / "inlay", "back"))
        with torch.no_grad():
            assert torch.equal(net(input_ids=ids).logits, before)
        adapter = inlay.adapters(net)["back"]
        timed("inlay: merge", adapter.merge)
        timed("inlay: unmerge", adapter.unmerge)
        timed("inlay: detach", lambda: inlay.detach(net))
        fresh = copy.deepcopy(model)
        timed("inlay: load, anatomy unknown", lambda: inlay.load(fresh, root / "inlay"))

    def pefts(root: Path) -> None:
        net: Any = copy.deepcopy(model)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        net = timed("PEFT: attach", lambda: peft.get_peft_model(net, config, adapter_name="a0"))
        for i in range(1, ADAPTERS):
            timed(f"PEFT: attach adapter {i + 1}", lambda i=i: net.add_adapter(f"a{i}", config))
        timed("PEFT: switch", lambda: net.set_adapter("a0"))
        timed("PEFT: save", lambda: net.save_pretrained(root / "peft", selected_adapters=["a0"]))
        timed("PEFT: merge", net.merge_adapter)
        timed("PEFT: unmerge", net.unmerge_adapter)
        fresh = copy.deepcopy(model)
        timed("PEFT: load", lambda: peft.PeftModel.from_pretrained(fresh, root / "peft" / "a0"))

    with tempfile.TemporaryDirectory(dir=spec.get("folder")) as folder:
        for i in range(spec["repeats"] + 1):
            for act in (inlays, pefts):
                (root := Path(folder) / f"{act.__name__}{i}").mkdir()
                act(root)
    return {"spec": spec, "load": load(), "ms": {what: spread(values[1:]) for what, values in times.items()}}


def one_row(spec: dict[str, Any]) -> dict[str, Any]:
    """What an unmerged adapter adds to one projection for one row without gradients, in microseconds."""
    import peft
    import torch
    from torch import nn

    import inlay

    torch.set_num_threads(1)
    depth, width = 48, 64
    plain = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).eval()
    x, targets = torch.randn(1, width), [str(i) for i in range(depth)]
    models: dict[str, Any] = {"base": plain}
    for name, dora in (("LoRA", False), ("DoRA", True)):
        net = copy.deepcopy(plain)
        method = (inlay.DoRA if dora else inlay.LoRA)(rank=16, sites=tuple(targets))
        inlay.attach(net, method, example={"input": x})
        config = peft.LoraConfig(r=16, target_modules=targets, use_dora=dora)
        models[f"inlay {name}"] = net.eval()
        models[f"PEFT {name}"] = peft.get_peft_model(copy.deepcopy(plain), config).eval()

    def run(net: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return net(x)

        return call

    found = in_turn({name: run(net) for name, net in models.items()}, spec["repeats"])
    added = {
        name: {
            key: (value - found["base"]["median"]) * 1e3 / depth if key != "n" else value for key, value in row.items()
        }
        for name, row in found.items()
        if name != "base"
    }
    return {"spec": spec, "load": load(), "base": found["base"]["median"] * 1e3 / depth, "us": added}


IMPORTS = {
    "python": "pass",
    "inlay": "import inlay",
    "torch": "import torch",
    "torch and transformers' Llama": "import torch; from transformers import LlamaForCausalLM",
    "the same, inlay.attach and LoRA": "import torch; from transformers import LlamaForCausalLM; from inlay import attach, LoRA",
    "the same and peft": "import torch; from transformers import LlamaForCausalLM; import peft",
    "inlay --help": "import sys; sys.argv = ['inlay', '--help']; from inlay.cli import main; main()",
}


def imports(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of fresh processes."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)

    found = in_turn({name: run(code) for name, code in IMPORTS.items()}, spec["repeats"])
    return {"spec": spec, "load": load(), "ms": found}


WHAT = {"handling": handling, "one row": one_row, "imports": imports}


def main() -> None:
    spec = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    print(json.dumps(WHAT[spec["what"]](spec)))


if __name__ == "__main__":
    main()
