"""What a run will cost, before it runs: parameters, memory, arithmetic, from a model's configuration alone.

skeleton   the model without weights            timeline   every allocation of a step, in order
bases      how weights are stored               step       the step that is recorded
footprint  memory for any batch and length      study      a method on a base
plan       the table of costs                   table, picture   how it is shown
"""

from __future__ import annotations

from inlay.planning.plan import REFERENCE, Cost, Plan, plan

__all__ = ["REFERENCE", "Cost", "Plan", "plan"]
