"""Stopping a process in order: the first signal asks, the second one insists.

The handlers run inside the event loop, so that `finally` blocks run and drains can await.
"""

import asyncio
import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from typing import NoReturn

_STDERR = 2  # whatever Python takes for it


class Shutdown:
    """SIGTERM and SIGINT as events of the running loop.

    `requested` is set by the first signal or by `request`; `forced` by the second signal.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.reason = ""

    def install(self) -> None:
        """Take over both signals. Call from the main thread, inside the loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def request(self, reason: str) -> None:
        """Ask for an orderly stop; only the first reason is kept."""
        if not self.requested.is_set():
            self.reason = reason
            self.requested.set()

    def _signalled(self, number: signal.Signals) -> None:
        if self.requested.is_set():
            self.forced.set()
        self.request(number.name)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send a signal to this process when its parent dies, however it dies (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def tell_faults() -> None:
    """Have a process that a fault of native code ends say where all its threads were, on standard error."""
    faulthandler.enable(_STDERR)


def end_process(code: int) -> NoReturn:
    """End this process with `code` as `sys.exit` does, but without tearing the interpreter down.

    A daemon thread that returns from one of torch's calls during that (a rendezvous that never came about, say) would
    abort the process.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - there is no public way
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
