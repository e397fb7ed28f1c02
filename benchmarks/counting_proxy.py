"""A TCP proxy that counts what passes through it, in both directions: bytes on the wire, of whatever protocol."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_READ_BYTES = 2**16


@dataclass(slots=True)
class Counts:
    """Bytes from the client to the server, and back."""

    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        """Both directions."""
        return self.sent + self.received

    def take(self) -> "Counts":
        """What has passed since the last time."""
        taken = Counts(self.sent, self.received)
        self.sent = self.received = 0
        return taken


@asynccontextmanager
async def counting_proxy(host: str, port: int) -> AsyncIterator[tuple[str, Counts]]:
    """Stand before a server; the proxy's own "host:port", and its counts."""
    counts = Counts()
    passing: set[asyncio.Task[None]] = set()

    async def connect(client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        server, request = await asyncio.open_connection(host, port)
        tasks = [
            asyncio.create_task(_pass_on(client, request, counts, "sent")),
            asyncio.create_task(_pass_on(server, answer, counts, "received")),
        ]
        passing.update(tasks)
        await asyncio.wait(tasks)

    proxy = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}", counts
    finally:
        proxy.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        await proxy.wait_closed()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, counts: Counts, name: str) -> None:
    try:
        while data := await source.read(_READ_BYTES):
            setattr(counts, name, getattr(counts, name) + len(data))
            target.write(data)
            await target.drain()
    finally:
        target.close()
