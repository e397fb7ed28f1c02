"""Weights over Gloo: a chain of pairs.

Gloo's own broadcast sends the whole buffer from the root again and again, so that nearly each receiver costs another
transfer. Here each member is in a group of two with either neighbour:

    rank 0 --> rank 1 --> rank 2 --> ...      each passes a chunk on while it receives the next
"""

import atexit
import contextlib
import ctypes
import functools
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.collective.address import address_towards
from common.types import EpochSpec

# How long an abort from another thread may go unnoticed.
_NOTICE = timedelta(seconds=0.2)
# What a member passes on at a time.
_CHUNK_BYTES = 2 * 2**20

# ProcessGroupGloo, whose collectives torch's stubs do not list.
_Pair = Any


class GlooChain:
    """One member of a chain; see `BroadcastGroup`."""

    device = torch.device("cpu")

    def __init__(self, spec: EpochSpec, rank: int, store: dist.Store, aborted: threading.Event) -> None:
        self.is_blocked = False
        self._timeout = timedelta(seconds=spec.timeout_s)
        self._aborted = aborted
        self._is_passed_on = spec.world_size > 2
        # With the member before this one, and with the one after it.
        self._upstream: list[_Pair] = []
        self._downstream: list[_Pair] = []
        try:
            # Pairs 0-1, 2-3, ... meet first, then 1-2, 3-4, ...: nobody waits for a whole chain.
            for low in sorted((rank - 1, rank), key=lambda low: low % 2):
                if 0 <= low < spec.world_size - 1:
                    side = self._downstream if low == rank else self._upstream
                    side.append(_meet(spec, dist.PrefixStore(f"{low}", store), rank - low, self._timeout))
        except BaseException:
            self.abort()
            raise

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """See `BroadcastGroup.stream`."""
        return contextlib.nullcontext()

    def broadcast(self, buffer: torch.Tensor) -> None:
        """See `BroadcastGroup.broadcast`."""
        upstream, downstream = self._upstream, self._downstream
        chunks = buffer.split(_CHUNK_BYTES) if self._is_passed_on and buffer.numel() else (buffer,)
        coming = [[self._start(pair, chunk) for pair in upstream] for chunk in chunks]
        going = []
        for chunk, works in zip(chunks, coming, strict=True):
            for work in works:
                self._wait(work)
            going += [self._start(pair, chunk) for pair in downstream]
        self.is_blocked = bool(going)
        for work in going:
            self._wait(work)
        self.is_blocked = False

    def _start(self, pair: _Pair, buffer: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        return pair.broadcast([buffer], options)

    def _wait(self, work: Any) -> None:
        while not work.is_completed():
            if self._aborted.is_set():  # Gloo's abort() does not interrupt it
                raise RuntimeError("the weight epoch was aborted")
            with contextlib.suppress(RuntimeError):  # not yet; or it failed, as wait() says below
                work.wait(_NOTICE)
        work.wait()

    def abort(self) -> None:
        """See `BroadcastGroup.abort`."""
        pairs = [*self._upstream, *self._downstream]
        self._upstream, self._downstream = [], []
        for pair in pairs:
            with contextlib.suppress(RuntimeError):  # already broken
                pair.abort()
            _destroy_later(pair, self._timeout.total_seconds() + 1)


def _meet(spec: EpochSpec, store: dist.Store, rank: int, timeout: timedelta) -> _Pair:
    """One of two neighbours: rank 0 is the one that sends."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001 - torch has no public names
    options._timeout = timeout  # noqa: SLF001
    options._devices = [_device(address_towards(spec.master_host, spec.master_port))]  # noqa: SLF001
    return dist.ProcessGroupGloo(store, rank, 2, options)


@functools.cache
def _device(address: str) -> Any:
    """One for all pairs of this process: each is a thread that wakes a hundred times a second, with or without work."""
    return dist.ProcessGroupGloo.create_device(hostname=address)


# Pairs that were aborted and still exist, by their id.
_aborted_pairs: dict[int, _Pair] = {}
_destroying = threading.Lock()


def _destroy_later(pair: _Pair, delay_s: float) -> None:
    """Gloo's destructor waits for a stuck operation until that has timed out: keep the object alive for that long."""
    _aborted_pairs[id(pair)] = pair
    keeper = threading.Timer(delay_s, _destroy, [id(pair)])
    keeper.daemon = True
    keeper.start()


def _destroy(key: int) -> None:
    with _destroying:
        del _aborted_pairs[key]


@atexit.register
def _leave_the_rest_to_the_kernel() -> None:
    """A destructor that still runs on a daemon thread when the interpreter ends would abort the process."""
    _destroying.acquire()  # for good: one that is under way ends, none begins any more
    for pair in _aborted_pairs.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pair))
