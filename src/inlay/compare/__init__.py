"""The same data, many methods, one report: `inlay compare`.

plan.py     which methods, seeds and amounts of data; one cell of that grid is one training run
heldout.py  the same held-out rows for every amount of data
cell.py     one run and everything that is measured on it, kept as one JSON file
costs.py    peak memory, and the time of inference with the adapter, merged, and without
table.py    cells of one method drawn together; the Markdown table
figures.py  quality against parameters, learning curves, little data, times
page.py     the HTML page
compare.py  the whole comparison, resumed where it stopped
"""

from __future__ import annotations

from inlay.compare.compare import Comparison, compare
from inlay.compare.plan import Plan, Variant

__all__ = ["Comparison", "Plan", "Variant", "compare"]
