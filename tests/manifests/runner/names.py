"""The DNS of the runner: names of Services and of pods, as CoreDNS answers for them."""

import asyncio
from collections.abc import Callable, Mapping
from typing import cast

from dnslib import QTYPE, RCODE, RR, A, DNSRecord

# Fully qualified names to addresses; a name without any is known, and has none.
Names = Mapping[str, list[str]]
DOMAIN = "svc.cluster.local"


class NameServer(asyncio.DatagramProtocol):
    """Answers from what `names` returns at that moment."""

    def __init__(self, names: Callable[[], Names]) -> None:
        self._names = names
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """One question."""
        assert self._transport is not None
        self._transport.sendto(answer(data, self._names()), addr)


def answer(question: bytes, names: Names) -> bytes:
    """The reply to one packet: addresses, nothing (another type is asked for), or that there is no such name."""
    asked = DNSRecord.parse(question)
    reply = asked.reply()
    name = str(asked.q.qname).rstrip(".").lower()
    if name not in names:
        reply.header.rcode = RCODE.NXDOMAIN
    elif asked.q.qtype == QTYPE.A:
        for address in names[name]:
            reply.add_answer(RR(asked.q.qname, QTYPE.A, rdata=A(address), ttl=0))
    packed: bytes = reply.pack()
    return packed
