"""The learner's end of the wire that carries weights: what `learner.weights.epoch` needs of it, and the real one.

A broadcast blocks whoever calls it, so the real one runs on threads; the event loop only waits.
"""

import asyncio
import socket
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from common.collective import BroadcastGroup
from common.types import EpochSpec


class Sender(Protocol):
    """Rank 0 of one epoch's broadcast group."""

    async def send(self, buffers: Sequence[torch.Tensor]) -> None:
        """Broadcast buffers to all members. Raises `RuntimeError` if a member is gone, or the group was aborted."""
        ...

    def abort(self) -> None:
        """Fail what is under way, here and soon at the members; idempotent."""
        ...


class Transport(Protocol):
    """Where epochs meet."""

    port: int
    """Of the rendezvous, for the members."""

    async def join(self, spec: EpochSpec) -> Sender:
        """Enter an epoch as rank 0, once all members are in. Raises `RuntimeError` if one did not come in time."""
        ...


class TorchTransport:
    """Gloo or NCCL, with a TCPStore at `host` as the rendezvous of all epochs."""

    def __init__(self, host: str) -> None:
        # By itself the store would listen at every address.
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    async def join(self, spec: EpochSpec) -> "TorchSender":
        """See `Transport.join`."""
        return TorchSender(await asyncio.to_thread(BroadcastGroup, spec, 0))


class TorchSender:
    """See `Sender`."""

    def __init__(self, group: BroadcastGroup) -> None:
        self._group = group

    async def send(self, buffers: Sequence[torch.Tensor]) -> None:
        """See `Sender.send`."""
        await asyncio.to_thread(self._send, buffers)

    def _send(self, buffers: Sequence[torch.Tensor]) -> None:
        for buffer in buffers:
            self._group.broadcast(buffer.to(self._group.device))

    def abort(self) -> None:
        """See `Sender.abort`."""
        self._group.abort()
