"""The process group that carries weights: one learner and some workers, fixed for one epoch.

Both ends use this class and nothing else: the learner as rank 0, each engine worker as a higher rank. It is built
straight from a TCPStore, beside the default group of `torch.distributed`, so that it can be made, aborted and made
again while training and generation go on. Gloo carries CPU tensors, NCCL carries CUDA tensors; the calls are the same.

With NCCL the members are one communicator, whose broadcast is a pipeline already. Gloo's sends the whole buffer from
the root again and again, so that nearly each receiver costs another transfer. Gloo's members are a chain of pairs here:

    rank 0 --> rank 1 --> rank 2 --> ...      each passes a chunk on while it receives the next
"""

import atexit
import contextlib
import ctypes
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.types import EpochSpec

# How long an abort from another thread may go unnoticed.
_NOTICE = timedelta(seconds=0.2)
_POLL_S = 0.0005
# What a member of a chain passes on at a time.
_CHUNK_BYTES = 2 * 2**20

# ProcessGroupGloo or ProcessGroupNCCL, whose collectives torch's stubs do not list.
_Backend = Any


class BroadcastGroup:
    """One epoch's communicator. Not thread-safe, except for `abort`, which any thread may call at any time."""

    def __init__(self, spec: EpochSpec, rank: int, device: torch.device | None = None) -> None:
        """Join the epoch as `rank`; blocks until all members are in. `device`: where NCCL's buffers lie.

        Raises:
            RuntimeError: a member did not come within `spec.timeout_s`, or the store is unreachable.
        """
        timeout = timedelta(seconds=spec.timeout_s)
        store = dist.TCPStore(
            spec.master_host, spec.master_port, is_master=False, timeout=timeout, wait_for_workers=False
        )
        # Keys of one epoch are invisible to every other, so that a straggler of an old one can disturb nobody.
        scoped = dist.PrefixStore(f"{spec.run_id}/{spec.epoch}", store)
        self.is_blocked = False
        """Whether all of a buffer has come, and the next member does not take it, or did not when it failed."""
        self._timeout = timeout
        self._aborted = threading.Event()
        self._world_size = spec.world_size
        # Backends of which this is not rank 0, and of which it is.
        self._upstream: list[_Backend] = []
        self._downstream: list[_Backend] = []
        try:
            if spec.backend == "nccl":
                (self._upstream if rank else self._downstream).append(_make_nccl(spec, scoped, rank, timeout))
            if spec.backend == "gloo":
                self._join_chain(spec, scoped, rank, timeout)
        except BaseException:
            self.abort()
            raise
        self.device = (device or torch.device("cuda", 0)) if spec.backend == "nccl" else torch.device("cpu")
        # Everybody is here before anybody returns: a missing member fails the epoch now, not in its first update.
        self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device))

    def _join_chain(self, spec: EpochSpec, store: dist.Store, rank: int, timeout: timedelta) -> None:
        """Meet both neighbours. Pairs 0-1, 2-3, ... meet first, then 1-2, 3-4, ...: nobody waits for a whole chain."""
        for low in sorted((rank - 1, rank), key=lambda low: low % 2):
            if 0 <= low < spec.world_size - 1:
                side = self._downstream if low == rank else self._upstream
                side.append(_make_gloo(spec, dist.PrefixStore(f"{low}", store), rank - low, timeout))

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Send `buffer` from rank 0 to all others, or receive it in place; blocks.

        Raises:
            RuntimeError: a member is gone, the group was aborted, or the epoch's timeout has passed.
        """
        upstream, downstream = self._upstream, self._downstream
        if self._aborted.is_set():
            raise RuntimeError("the weight epoch was aborted")
        is_passed_on = self._world_size > 2 and not buffer.is_cuda and buffer.numel() > 0
        chunks = buffer.split(_CHUNK_BYTES) if is_passed_on else (buffer,)
        coming = [[self._start(backend, chunk) for backend in upstream] for chunk in chunks]
        going = []
        for chunk, works in zip(chunks, coming, strict=True):
            for work in works:
                self._wait(work)
            going += [self._start(backend, chunk) for backend in downstream]
        self.is_blocked = bool(going)
        for work in going:
            self._wait(work)
        self.is_blocked = False
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)  # NCCL's wait() only orders streams

    def _start(self, backend: _Backend, buffer: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        return backend.broadcast([buffer], options)

    def _wait(self, work: Any) -> None:
        while not work.is_completed():
            if self._aborted.is_set():
                raise RuntimeError("the weight epoch was aborted")
            if self.device.type == "cuda":
                time.sleep(_POLL_S)
            else:  # Gloo's abort() does not interrupt it
                with contextlib.suppress(RuntimeError):  # not yet; or it failed, as wait() says below
                    work.wait(_NOTICE)
        work.wait()

    def abort(self) -> None:
        """Fail what is under way, here and soon at the peers. The group is unusable afterwards; idempotent."""
        self._aborted.set()
        backends = [*self._upstream, *self._downstream]
        self._upstream, self._downstream = [], []
        for backend in backends:
            with contextlib.suppress(RuntimeError):  # already broken
                backend.abort()
            _destroy_later(backend, self._timeout.total_seconds() + 1)


# Backends that were aborted and still exist, by their id.
_aborted_backends: dict[int, dist.Backend] = {}
_destroying = threading.Lock()


def _destroy_later(backend: dist.Backend, delay_s: float) -> None:
    """Gloo's destructor waits for a stuck operation until that has timed out: keep the object alive for that long."""
    _aborted_backends[id(backend)] = backend
    keeper = threading.Timer(delay_s, _destroy, [id(backend)])
    keeper.daemon = True
    keeper.start()


def _destroy(key: int) -> None:
    with _destroying:
        del _aborted_backends[key]


@atexit.register
def _leave_the_rest_to_the_kernel() -> None:
    """A destructor that still runs on a daemon thread when the interpreter ends would abort the process."""
    _destroying.acquire()  # for good: one that is under way ends, none begins any more
    for backend in _aborted_backends.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))


def _make_nccl(spec: EpochSpec, store: dist.Store, rank: int, timeout: timedelta) -> _Backend:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout  # noqa: SLF001 - torch has no public name for it
    return dist.ProcessGroupNCCL(store, rank, spec.world_size, options)


def _make_gloo(spec: EpochSpec, store: dist.Store, rank: int, timeout: timedelta) -> _Backend:
    """One of two neighbours: rank 0 is the one that sends."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001 - nor for these
    options._timeout = timeout  # noqa: SLF001
    options._devices = [  # noqa: SLF001
        dist.ProcessGroupGloo.create_device(hostname=address_towards(spec.master_host, spec.master_port))
    ]
    return dist.ProcessGroupGloo(store, rank, 2, options)


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the route to `host`: the one that the other members can reach."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
