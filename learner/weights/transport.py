"""The learner's end of the wire that carries weights: what `learner.weights.epoch` needs of it, and the real one.

A broadcast blocks whoever calls it, so the real one runs on threads; the event loop only waits.
"""

import asyncio
import functools
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
import torch.distributed as dist

from common.collective import BroadcastGroup, epoch_of
from common.config import ConfigError
from common.process.threads import run_in_thread, to_own_thread
from common.types import EpochSpec


class Sender(Protocol):
    """Rank 0 of one epoch's broadcast group."""

    async def send(self, buffers: Sequence[torch.Tensor], filled: Sequence[Future[Any]]) -> None:
        """Broadcast buffers to all members, each as soon as it is filled.

        Raises `RuntimeError` if a member is gone, or the group was aborted, and what broke off the filling.
        """
        ...

    def abort(self) -> None:
        """Fail what is under way, here and soon at the members; idempotent."""
        ...


class Transport(Protocol):
    """Where epochs meet."""

    port: int
    """Of the rendezvous, for the members."""

    async def join(self, spec: EpochSpec) -> Sender:
        """Enter an epoch as rank 0, once all members are in. Raises `RuntimeError` if one did not come in time.

        Cancelled, it leaves nothing behind, at the latest when the time of the epoch is over.
        """
        ...


class TorchTransport:
    """Gloo or NCCL, with a TCPStore at `host` as the rendezvous of all epochs."""

    def __init__(self, host: str) -> None:
        """Raises ConfigError for a host that is not this machine."""
        # By itself the store would listen at every address.
        try:
            listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise ConfigError(
                f"weights.host: {host} is no address of this machine: {error.strerror or error}"
            ) from None
        self.port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    async def join(self, spec: EpochSpec) -> "TorchSender":
        """See `Transport.join`."""
        # On a thread of its own: it may wait for somebody who never comes, longer than anybody waits for it.
        joining = run_in_thread(functools.partial(self._join, spec), f"join-epoch-{spec.epoch}")
        try:
            return TorchSender(await asyncio.wrap_future(joining))
        except asyncio.CancelledError:
            joining.add_done_callback(_abort)
            raise

    def _join(self, spec: EpochSpec) -> BroadcastGroup:
        for key in self._store.list_keys():
            # Of an epoch that has ended. A later one may have begun: this thread may run after its join is given up.
            if epoch_of(key) < spec.epoch:
                self._store.delete_key(key)
        return BroadcastGroup(spec, 0)


class TorchSender:
    """See `Sender`."""

    def __init__(self, group: BroadcastGroup) -> None:
        self._group = group

    async def send(self, buffers: Sequence[torch.Tensor], filled: Sequence[Future[Any]]) -> None:
        """See `Sender.send`."""
        # On a thread of its own: the members wait for it against the clock.
        await to_own_thread("send-weights", self._send, buffers, filled)

    def _send(self, buffers: Sequence[torch.Tensor], filled: Sequence[Future[Any]]) -> None:
        with self._group.stream():
            for buffer, is_filled in zip(buffers, filled, strict=True):
                is_filled.result()
                self._group.broadcast(buffer.to(self._group.device))

    def abort(self) -> None:
        """See `Sender.abort`."""
        self._group.abort()


def _abort(joined: "Future[BroadcastGroup]") -> None:
    if joined.exception() is None:
        joined.result().abort()
