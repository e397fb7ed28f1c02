"""Broadcast groups in memory: the weights' wire of the simulation, with the failures of the real one.

A bucket is one number, which stands for its bytes; its checksum is the number itself.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from common.types import EpochSpec
from tests.simulation.network import Link

LEARNER = 0


@dataclass(eq=False)
class Peer:
    """One rank of a group. `link`: on which it hangs; None for the learner."""

    group: "Group"
    link: Link | None
    inbox: list[int] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False

    async def receive(self, num_buckets: int) -> list[int]:
        """The next buckets, as they came. Raises RuntimeError if somebody left or was silent for too long."""
        await self.until(lambda: len(self.inbox) >= num_buckets)
        received, self.inbox = self.inbox[:num_buckets], self.inbox[num_buckets:]
        return received

    async def opened(self) -> None:
        await self.until(lambda: self.group.is_open)

    async def until(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(self.group.timeout_s):
                while not condition():
                    if self.broken:
                        raise RuntimeError("the weight epoch was aborted, or a member is gone")
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise RuntimeError("the weight epoch timed out") from None

    def abort(self) -> None:
        """Leave; the others notice, if they can hear it."""
        self.break_off()
        self.group.lost(self)

    def break_off(self) -> None:
        self.broken = True
        self.news.set()


@dataclass(eq=False)
class Group:
    """The members of one epoch, by rank."""

    timeout_s: float
    world_size: int
    peers: dict[int, Peer] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return len(self.peers) == self.world_size

    def add(self, rank: int, peer: Peer) -> None:
        self.peers[rank] = peer
        if self.is_open:
            for other in self.peers.values():
                _carry(other.link, other.news.set)

    def lost(self, gone: Peer) -> None:
        for other in self.peers.values():
            if other is not gone and not other.broken:
                _carry(gone.link, lambda other=other: _carry(other.link, other.break_off))  # type: ignore[misc]


class Wire:
    """`learner.weights.transport.Transport` of all learners, and the actors' way in."""

    port = 1

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int], Group] = {}

    def enter(self, spec: EpochSpec, rank: int, link: Link | None) -> Peer:
        """Knock; `Peer.opened` says when everybody is in."""
        group = self._groups.setdefault((spec.run_id, spec.epoch), Group(spec.timeout_s, spec.world_size))
        peer = Peer(group, link)
        _carry(link, lambda: group.add(rank, peer) if not peer.broken else None)
        return peer

    async def join(self, spec: EpochSpec) -> "Sender":
        """The learner's way in."""
        peer = self.enter(spec, LEARNER, None)
        try:
            await peer.opened()
        except (RuntimeError, asyncio.CancelledError):
            peer.abort()
            raise
        return Sender(peer)


class Sender:
    """`learner.weights.transport.Sender`."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._num_missing = 0

    async def send(self, buffers: Sequence[torch.Tensor], filled: Sequence[Future[Any]]) -> None:
        """Returns when everybody has everything."""
        receivers = [peer for peer in self.peer.group.peers.values() if peer is not self.peer]
        for buffer, is_filled in zip(buffers, filled, strict=True):
            await asyncio.wrap_future(is_filled)
            self._num_missing = len(receivers)
            for peer in receivers:
                if not self.peer.broken:
                    _carry(peer.link, functools.partial(self._deliver, peer, int(buffer)))
            await self.peer.until(lambda: not self._num_missing)

    def _deliver(self, peer: Peer, value: int) -> None:
        if peer.link is not None and peer.link.actor.corrupt_next:
            peer.link.actor.corrupt_next = False
            value += 1
        peer.inbox.append(value)
        peer.news.set()
        self._num_missing -= 1
        self.peer.news.set()

    def abort(self) -> None:
        self.peer.abort()


def _carry(link: Link | None, message: Callable[[], None]) -> None:
    if link is None:
        asyncio.get_running_loop().call_soon(message)
    else:
        link.carry(message)
