"""Who calls, and how many streams each caller may have open at once.

A caller is an address with the names of its certificate; ports do not count, so that more connections bring no more
streams. Callers behind one proxy are one caller, unless their certificates differ.
"""

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from common.errors import TooManyStreams

Context = grpc.aio.ServicerContext[Any, Any]
Peer = tuple[str, frozenset[str]]


def names_of(context: Context) -> frozenset[str]:
    """DNS names of the caller's certificate; none without one."""
    names = context.auth_context().get("peer_dns", ())
    return frozenset(name.decode(errors="replace") for name in names)


def peer_of(context: Context) -> Peer:
    """Address without its port, and names. gRPC writes "ipv4:10.0.0.7:50123", or "ipv6:%5B::1%5D:50123"."""
    return context.peer().rpartition(":")[0], names_of(context)


class StreamLimit:
    """Counts the open streams of each caller."""

    def __init__(self, max_per_peer: int) -> None:
        self._max_per_peer = max_per_peer
        self._open: collections.Counter[Peer] = collections.Counter()

    @contextmanager
    def stream(self, peer: Peer) -> Iterator[None]:
        """One stream, for as long as the block runs. Raises TooManyStreams."""
        if self._open[peer] >= self._max_per_peer:
            raise TooManyStreams(f"{self._max_per_peer} streams of this caller are open, the most")
        self._open[peer] += 1
        try:
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]
