"""Every error that inlay raises on purpose.

    InlayError
    ├── SiteError(ValueError)          a selector that matches nothing, a site a method cannot use
    ├── MethodError(ValueError)        a method whose settings contradict each other or the model
    ├── AdapterError(ValueError)       an unknown, duplicate or unusable adapter; a row that names one
    ├── AttachmentError(RuntimeError)  the model was changed under our feet (wrapped, sharded, reset)
    ├── MergeError(TypeError)          a merge that cannot be exact
    ├── FormatError(ValueError)        an adapter folder that is broken, foreign or newer
    ├── QuantizationError(ValueError)  a base that cannot be stored or read as asked
    ├── ConfigError(ValueError)        a run configuration with unknown, mistyped or contradictory keys
    ├── DataError(ValueError)          a file or a row that is not what it should be
    ├── CheckpointError(RuntimeError)  no complete checkpoint, or one that belongs to another run
    └── TrainingError(RuntimeError)    a run that must not go on: non-finite loss, nothing to learn

Each message states the rule, the value that broke it, and what to do. The command line prints the message alone and
exits with `exit_code`: 2 for usage, 1 for data and for runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InlayError(Exception):
    """Base of all errors raised by inlay on purpose."""

    exit_code = 1


class SiteError(InlayError, ValueError):
    """A site selector that matches nothing, or a site that a method cannot use."""

    exit_code = 2


class MethodError(InlayError, ValueError):
    """A method whose settings contradict each other or the model at hand."""

    exit_code = 2


class AdapterError(InlayError, ValueError):
    """An adapter that is unknown, named twice, or cannot be used as asked."""


class AttachmentError(InlayError, RuntimeError):
    """A model that was changed so that adapters can no longer be attached, reached or removed exactly."""


class MergeError(InlayError, TypeError):
    """A merge that cannot be exact."""


class FormatError(InlayError, ValueError):
    """An adapter folder that is incomplete, damaged, foreign, or written by a newer version."""


class QuantizationError(InlayError, ValueError):
    """A weight that cannot be stored or read in the quantised form asked for."""


class ConfigError(InlayError, ValueError):
    """A run configuration with unknown, mistyped or contradictory keys."""

    exit_code = 2


class DataError(InlayError, ValueError):
    """A data file or row that is not what it should be."""


class CheckpointError(InlayError, RuntimeError):
    """No complete checkpoint, or one that belongs to another run."""


class TrainingError(InlayError, RuntimeError):
    """A training run that must not go on."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A clause that names the closest known words, or all of them when none is close.

    >>> nearest("quary", ["query", "key", "value"])
    "did you mean 'query'?"
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(k) for k in close) + "?"
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"known: {shown}" if known else "there are none"
