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
    from inlay.anatomy import anatomy as anatomy
    from inlay.anatomy.base import Anatomy as Anatomy
    from inlay.anatomy.base import Site as Site
    from inlay.quant import FP4 as FP4
    from inlay.quant import NF4 as NF4

# Public name -> the module that defines it. Where the name is that of the module, the module itself is meant.
# A new name needs a line here, one above for type checkers, and one in tests/contracts/test_public_api.py.
_HOME = {
    "Anatomy": "inlay.anatomy.base",
    "FP4": "inlay.quant",
    "NF4": "inlay.quant",
    "Site": "inlay.anatomy.base",
    "anatomy": "inlay.anatomy",
    "errors": "inlay.errors",
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
