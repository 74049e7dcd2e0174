"""inlay sets small trainable pieces into a frozen pretrained model.

    import inlay

    adapter = inlay.attach(model, inlay.LoRA(rank=16, sites="linear"), name="legal")
    ...                                  # any training loop; only the adapter's parameters learn
    adapter.save("runs/legal")

Names are imported when first used, so that `import inlay` costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inlay._version import __version__ as __version__

if TYPE_CHECKING:
    from inlay import errors as errors
    from inlay.adapter import Adapter as Adapter
    from inlay.adapter import attach as attach
    from inlay.adapter import detach as detach
    from inlay.adapter import load as load
    from inlay.anatomy import anatomy as anatomy
    from inlay.anatomy.base import Anatomy as Anatomy
    from inlay.anatomy.base import Site as Site
    from inlay.combining import combine as combine
    from inlay.ensembling import ensemble as ensemble
    from inlay.ensembling import ensemble_generate as ensemble_generate
    from inlay.export import export_merged as export_merged
    from inlay.methods.adalora import AdaLoRA as AdaLoRA
    from inlay.methods.base import Delta as Delta
    from inlay.methods.base import ExtraKV as ExtraKV
    from inlay.methods.base import HeadDelta as HeadDelta
    from inlay.methods.base import Method as Method
    from inlay.methods.base import Mix as Mix
    from inlay.methods.base import Replacement as Replacement
    from inlay.methods.base import VirtualTokens as VirtualTokens
    from inlay.methods.base import citation as citation
    from inlay.methods.bitfit import BitFit as BitFit
    from inlay.methods.bottleneck import Bottleneck as Bottleneck
    from inlay.methods.cell import Inlay as Inlay
    from inlay.methods.diff_pruning import DiffPruning as DiffPruning
    from inlay.methods.dora import DoRA as DoRA
    from inlay.methods.full import Full as Full
    from inlay.methods.full import HeadOnly as HeadOnly
    from inlay.methods.ia3 import IA3 as IA3
    from inlay.methods.lora import LoRA as LoRA
    from inlay.methods.mam import MAM as MAM
    from inlay.methods.multi_head import MultiHead as MultiHead
    from inlay.methods.p_tuning import PTuning as PTuning
    from inlay.methods.p_tuning_v2 import PTuningV2 as PTuningV2
    from inlay.methods.prefix import Prefix as Prefix
    from inlay.methods.prompt import Prompt as Prompt
    from inlay.methods.unipelt import UniPELT as UniPELT
    from inlay.planning.plan import plan as plan
    from inlay.prefix_words import init_prefix_from_words as init_prefix_from_words
    from inlay.quant import FP4 as FP4
    from inlay.quant import NF4 as NF4
    from inlay.quant import Int4 as Int4
    from inlay.quant import load_quantized as load_quantized
    from inlay.quant import quantize as quantize
    from inlay.state import adapters as adapters
    from inlay.state import use as use
    from inlay.template import Template as Template
    from inlay.template import fill_template as fill_template
    from inlay.train.callback import InlayCallback as InlayCallback
    from inlay.verbalizer import Verbalizer as Verbalizer

# Public name -> the module that defines it. Where the name is that of the module, the module itself is meant.
# A new name needs a line here, one above for type checkers, and one in tests/contracts/test_public_api.py.
_HOME = {
    "AdaLoRA": "inlay.methods.adalora",
    "Adapter": "inlay.adapter",
    "Anatomy": "inlay.anatomy.base",
    "BitFit": "inlay.methods.bitfit",
    "Bottleneck": "inlay.methods.bottleneck",
    "Delta": "inlay.methods.base",
    "DiffPruning": "inlay.methods.diff_pruning",
    "DoRA": "inlay.methods.dora",
    "ExtraKV": "inlay.methods.base",
    "FP4": "inlay.quant",
    "Full": "inlay.methods.full",
    "HeadDelta": "inlay.methods.base",
    "HeadOnly": "inlay.methods.full",
    "IA3": "inlay.methods.ia3",
    "Inlay": "inlay.methods.cell",
    "InlayCallback": "inlay.train.callback",
    "Int4": "inlay.quant",
    "LoRA": "inlay.methods.lora",
    "MAM": "inlay.methods.mam",
    "Method": "inlay.methods.base",
    "Mix": "inlay.methods.base",
    "MultiHead": "inlay.methods.multi_head",
    "NF4": "inlay.quant",
    "PTuning": "inlay.methods.p_tuning",
    "PTuningV2": "inlay.methods.p_tuning_v2",
    "Prefix": "inlay.methods.prefix",
    "Prompt": "inlay.methods.prompt",
    "Replacement": "inlay.methods.base",
    "Site": "inlay.anatomy.base",
    "Template": "inlay.template",
    "UniPELT": "inlay.methods.unipelt",
    "Verbalizer": "inlay.verbalizer",
    "VirtualTokens": "inlay.methods.base",
    "adapters": "inlay.state",
    "anatomy": "inlay.anatomy",
    "attach": "inlay.adapter",
    "citation": "inlay.methods.base",
    "combine": "inlay.combining",
    "detach": "inlay.adapter",
    "ensemble": "inlay.ensembling",
    "ensemble_generate": "inlay.ensembling",
    "errors": "inlay.errors",
    "export_merged": "inlay.export",
    "fill_template": "inlay.template",
    "init_prefix_from_words": "inlay.prefix_words",
    "load": "inlay.adapter",
    "load_quantized": "inlay.quant",
    "plan": "inlay.planning.plan",
    "quantize": "inlay.quant",
    "use": "inlay.state",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    module = import_module(home)
    value = module if home == f"inlay.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
