"""Many runs that differ in a few settings: `space` says which, `together` trains them, `run` keeps them, `table` tells.

Runs that differ only in method and optimizer share the frozen base, so their batches go through it in one pass, each
row with its own run's adapter.
"""

from inlay.sweep.run import Swept, sweep
from inlay.sweep.space import Point, Space

__all__ = ["Point", "Space", "Swept", "sweep"]
