"""The first signal asks, the second ends, and the handlers of others come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from inlay.train.signals import StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_is_only_noted(signum):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        stop.defer()
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_before_there_is_anything_to_save_it_ends_the_run(signum):
    with pytest.raises(SystemExit) as ended, StopRequest():
        os.kill(os.getpid(), signum)
    assert ended.value.code == 128 + signum


def test_the_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal\n"
        "from inlay.train.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    stop.defer()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally: print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_ends_without_a_traceback_before_any_run(signum):
    code = (
        "import os, sys, inlay.cli as cli\n"
        f"cli.build = lambda only: os.kill(os.getpid(), {int(signum)})\n"
        "cli.main()\n"
        "print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signum, "", "")


def test_outside_the_main_thread_nothing_is_touched():
    import threading

    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
