"""SIGTERM and Ctrl-C: the first asks the run to stop at its next safe point, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first signal is only noted in `signum`; outside the main thread it does nothing.

    Only after `defer` and until `release`, though: before the first step there is nothing to save, and after the last
    one everything is saved, so that the first signal raises `SystemExit` with 128 + signal.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def defer(self) -> None:
        """From now on a signal waits for the next safe point."""
        self.deferred = True

    def release(self) -> None:
        """From now on a signal ends the run where it stands; one that came since the last safe point does so now."""
        self.deferred = False
        if self.signum is not None:
            self._end()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        if not self.deferred:
            self._end()

    def _end(self) -> None:
        signum = self.signum or 0
        os.write(2, f"stopped: {signal.Signals(signum).name}; nothing is lost\n".encode())
        raise SystemExit(128 + signum)
