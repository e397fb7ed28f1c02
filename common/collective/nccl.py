"""Weights over NCCL: all members are one communicator, whose broadcast is a pipeline already.

torch's own supervision of NCCL is left out. It ends the process that holds a collective which failed or took too long,
on a thread of its own and whatever the others do: right for a training job, whose ranks are lost together, wrong for a
group that one bad actor must not take down. Deadlines and aborts are kept here instead.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.process.threads import run_in_thread
from common.types import EpochSpec

_POLL_S = 0.0005
_MAX_STREAMS = 64  # more than torch has for a device, 32
# With it torch starts no watchdog for a group, and no monitor for the watchdog.
_NO_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"
# There from now on: adding and removing a variable while other threads of C read theirs is not safe, changing it is.
os.environ.setdefault(_NO_WATCHDOG, "0")

# ProcessGroupNCCL, whose collectives torch's stubs do not list.
_Backend = Any


class NcclCommunicator:
    """One member; see `BroadcastGroup`."""

    is_blocked = False

    def __init__(
        self, spec: EpochSpec, rank: int, store: dist.Store, aborted: threading.Event, device: torch.device
    ) -> None:
        self.device = device
        self._timeout_s = spec.timeout_s
        self._aborted = aborted
        timeout = timedelta(seconds=spec.timeout_s)
        # NCCL waits for all ranks without a deadline, and nothing interrupts it: only who sees them all begins.
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(spec.world_size)], timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout  # noqa: SLF001 - torch has no public name for it
        with _no_watchdog():
            self._backend: _Backend | None = dist.ProcessGroupNCCL(store, rank, spec.world_size, options)
        self._aborting = threading.Lock()
        self._in_flight: list[Any] = []
        if device.type == "cuda":
            _take_turn(device)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """See `BroadcastGroup.stream`."""
        return torch.cuda.stream(_stream(self.device))

    def broadcast(self, buffer: torch.Tensor) -> None:
        """See `BroadcastGroup.broadcast`. `buffer` was made in `stream`."""
        backend = self._backend
        if backend is None:
            raise RuntimeError("the weight epoch was aborted")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        with self.stream():
            in_flight = self._in_flight = [buffer]
            work = backend.broadcast([buffer], options)
            in_flight.append(work)
            deadline = time.monotonic() + self._timeout_s
            while not work.is_completed():  # once it is, the bytes are there: no stream has to wait
                if self._aborted.is_set():
                    raise RuntimeError("the weight epoch was aborted")
                if time.monotonic() > deadline:
                    self._aborted.set()
                    self.abort()  # its kernel would wait on the GPU for ever
                    raise RuntimeError(f"the weight epoch timed out after {self._timeout_s:g} s")
                time.sleep(_POLL_S)
            work.wait()  # raises what went wrong, but for an abort: that completes the work too
            in_flight.clear()
            if self._aborted.is_set():
                raise RuntimeError("the weight epoch was aborted")

    def abort(self) -> None:
        """See `BroadcastGroup.abort`. torch waits for NCCL there, so it is left to a thread."""
        with self._aborting:
            backend, self._backend = self._backend, None
        if backend is not None:
            run_in_thread(functools.partial(_abort, backend, self._in_flight), "abort-nccl")


def _abort(backend: _Backend, in_flight: list[Any]) -> None:
    """What is in flight is let go once no kernel can write to it any more."""
    backend.abort()
    in_flight.clear()


@contextlib.contextmanager
def _no_watchdog() -> Iterator[None]:
    """For groups that are made inside: torch reads the variable when it makes one."""
    with _environment:
        before = os.environ.get(_NO_WATCHDOG, "0")
        os.environ[_NO_WATCHDOG] = "1"
        try:
            yield
        finally:
            os.environ[_NO_WATCHDOG] = before


_environment = threading.Lock()


def _take_turn(device: torch.device) -> None:
    """Have the group that is made next draw the stream that the first one drew.

    torch hands 32 streams out in turn, to all who ask. Each group draws one at its first collective: after some
    epochs it would be one on which vLLM computes too, and generation would wait for the wire. Streams are drawn here
    until it is the turn of the same one. Who draws one at the same moment shifts that for one epoch.
    """
    before = _turn(device)
    for _ in range(_MAX_STREAMS):
        if torch.cuda.Stream(device) == before:
            return


@functools.cache
def _turn(device: torch.device) -> "torch.cuda.Stream":
    """The stream whose successor is that of the groups. `_stream` is drawn first, or it would be the successor."""
    _stream(device)
    return torch.cuda.Stream(device)


@functools.cache
def _stream(device: torch.device) -> "torch.cuda.Stream | None":
    """Always the same: torch's allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
