"""The text that `print(adapter)` shows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from inlay.anatomy.probe import modules_of
from inlay.methods.base import citation
from inlay.sharded import size_of

if TYPE_CHECKING:
    from torch import nn

    from inlay.adapter import Adapter


def base_parameters(model: nn.Module) -> int:
    """Number of parameters of the base, tied ones once, 4-bit storage as two values a byte."""
    from inlay.quant.bridge import logical_shape

    total, seen = 0, set[int]()
    for _, module in modules_of(model):
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.is_floating_point():
                total += size_of(parameter)
            else:
                out, inn = logical_shape(module)
                total += out * inn
    return total


def describe(adapter: Adapter) -> str:
    """Sites, counts, share of the base, and what to cite."""
    base = base_parameters(adapter.model)
    trained, stored, head = adapter.trained_parameters, adapter.stored_parameters, adapter.head_parameters
    sites = Counter(s.name for s in adapter.sites)
    lines = [
        f"adapter {adapter.name!r}: {adapter.method!r}",
        f"  trained   {trained:,} parameters = {100 * trained / max(base, 1):.4f} % of the base's {base:,}"
        + (f" (task head: {head:,})" if head else ""),
        f"  stored    {stored:,}" + _why_other(trained, stored),
        "  sites     " + ", ".join(f"{name} x {n}" for name, n in sites.items()),
    ]
    if adapter.merged:
        lines.append("  merged    into the weights; unmerge() takes it out")
    cite = citation(adapter)
    titles = [line.split("=", 1)[1].strip(" {},") for line in cite.splitlines() if line.strip().startswith("title")]
    if titles:
        lines.append("  cite      " + "; ".join(titles) + "  (inlay.citation(adapter) prints BibTeX)")
    return "\n".join(lines)


def _why_other(trained: int, stored: int) -> str:
    if stored == trained:
        return ""
    if stored > trained:
        return " (with values that are kept, but not trained by gradients)"
    return " (what only training needs is left out when saved)"
