"""One epoch's broadcast group, as both ends use it: the learner as rank 0, each engine worker as a higher rank.

It is built straight from a TCPStore, beside the default group of `torch.distributed`, so that it can be made, aborted
and made again while training and generation go on. Gloo carries CPU tensors, NCCL carries CUDA tensors; the calls are
the same.
"""

import os
import socket
import threading
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from common.collective.gloo import GlooChain
from common.collective.nccl import NcclCommunicator
from common.errors import RendezvousUnreachable
from common.types import EpochSpec

# torch asks the resolver for the name of whom it has connected to, if only for a message. One that does not answer
# would hold up every join for ten seconds and more.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")

# A network may refuse for a second while it is set up, as a pod's does: there is no way if it still does after that.
_REFUSED_S = 3.0
_AGAIN_S = 0.2


class _Wire(Protocol):
    """What carries the bytes of one epoch."""

    device: torch.device
    is_blocked: bool

    def broadcast(self, buffer: torch.Tensor) -> None: ...

    def stream(self) -> AbstractContextManager[Any]: ...

    def abort(self) -> None: ...


class BroadcastGroup:
    """One epoch's communicator. Not thread-safe, except for `abort`, which any thread may call at any time."""

    def __init__(self, spec: EpochSpec, rank: int, device: torch.device | None = None) -> None:
        """Join the epoch as `rank`; blocks until all members are in. `device`: where NCCL's buffers lie.

        Raises:
            RendezvousUnreachable: there is no way to the store. Said before those that wait for this member are late.
            RuntimeError: a member did not come within `spec.timeout_s`.
        """
        store = _reach_store(spec)
        scoped = dist.PrefixStore(key_prefix(spec), store)
        self._aborted = threading.Event()
        self._wire: _Wire
        if spec.backend == "nccl":
            self._wire = NcclCommunicator(spec, rank, scoped, self._aborted, device or torch.device("cuda", 0))
        else:
            self._wire = GlooChain(spec, rank, scoped, self._aborted)
        try:
            # Everybody is here before anybody returns: a missing member fails the epoch now, not in its first update.
            with self.stream():
                self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device))
        except BaseException:
            self.abort()
            raise

    @property
    def device(self) -> torch.device:
        """Where buffers lie."""
        return self._wire.device

    @property
    def is_blocked(self) -> bool:
        """Whether all of a buffer has come, and the next member does not take it, or did not when it failed.

        Never with NCCL, which does not say who waits for whom.
        """
        return self._wire.is_blocked

    def stream(self) -> AbstractContextManager[Any]:
        """Where buffers are made and worked on: on a GPU a stream of their own, beside what else it computes."""
        return self._wire.stream()

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Send `buffer` from rank 0 to all others, or receive it in place; blocks until the bytes are there.

        Raises:
            RuntimeError: a member is gone, the group was aborted, or the epoch's timeout has passed.
        """
        if self._aborted.is_set():
            raise RuntimeError("the weight epoch was aborted")
        self._wire.broadcast(buffer)

    def abort(self) -> None:
        """Fail what is under way, here and soon at the peers. Does not block; idempotent.

        The group is unusable afterwards.
        """
        self._aborted.set()
        self._wire.abort()


def key_prefix(spec: EpochSpec) -> str:
    """Of all keys of the epoch in the store, and of no other's: a straggler of an old one can disturb nobody."""
    return f"{spec.run_id}/{spec.epoch}/"


def epoch_of(key: str) -> int:
    """The epoch of a key that begins with a `key_prefix`."""
    return int(key.split("/")[1])


def _reach_store(spec: EpochSpec) -> dist.TCPStore:
    """The learner's. torch tries to connect for up to twice its timeout: whether there is a way is seen before."""
    where = (spec.master_host, spec.master_port)
    try:
        _knock(where, spec.timeout_s / 2)
        timeout = timedelta(seconds=spec.timeout_s)
        return dist.TCPStore(*where, is_master=False, timeout=timeout, wait_for_workers=False)
    except (OSError, dist.DistNetworkError) as error:
        raise RendezvousUnreachable(
            f"the rendezvous at {spec.master_host}:{spec.master_port} cannot be reached: {error}"
        ) from error


def _knock(where: tuple[str, int], timeout_s: float) -> None:
    """Connect once. Raises OSError if that is refused for a while, or there is no answer within `timeout_s`."""
    started_at = time.monotonic()
    while True:
        left_s = timeout_s - (time.monotonic() - started_at)
        try:
            socket.create_connection(where, max(left_s, _AGAIN_S)).close()
            return
        except OSError:
            if time.monotonic() - started_at + _AGAIN_S >= min(_REFUSED_S, timeout_s):
                raise
        time.sleep(_AGAIN_S)
