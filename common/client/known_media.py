"""Which media an actor has, as far as its client can know, so that an image crosses the network once."""

import asyncio
import collections
import contextlib
from collections.abc import Iterable, Iterator, Sequence

# A wrong belief costs one round trip.
_MAX_KNOWN = 65536


class KnownMedia:
    """What an actor is believed to hold, and what is on its way there, by sha256. Belongs to one event loop."""

    def __init__(self) -> None:
        # An ordered set: the oldest belief goes first.
        self._known: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._being_sent: dict[bytes, asyncio.Future[None]] = {}

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._known

    def remember(self, sha256s: Iterable[bytes]) -> None:
        """It holds them now."""
        for sha256 in sha256s:
            self._known[sha256] = None
            self._known.move_to_end(sha256)
            self._no_longer_sent(sha256)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def forget(self, sha256s: Iterable[bytes]) -> None:
        """It does not."""
        for sha256 in sha256s:
            self._known.pop(sha256, None)

    def clear(self) -> None:
        """It holds nothing."""
        self._known.clear()

    async def sent_by_others(self, sha256s: Sequence[bytes], timeout_s: float) -> None:
        """Wait while other groups send any of these; where one fails, another sends them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while others := [sent for sha256 in sha256s if (sent := self._being_sent.get(sha256)) is not None]:
                    await asyncio.wait(others)

    @contextlib.contextmanager
    def sending(self, sha256s: Iterable[bytes]) -> Iterator[None]:
        """Others wait for what of these the actor lacks, until it has come or this block ends."""
        new = [sha256 for sha256 in {*sha256s} if not (sha256 in self._known or sha256 in self._being_sent)]
        mine: dict[bytes, asyncio.Future[None]] = {sha256: asyncio.get_running_loop().create_future() for sha256 in new}
        self._being_sent |= mine
        try:
            yield
        finally:
            for sha256, sent in mine.items():
                if self._being_sent.get(sha256) is sent:
                    self._no_longer_sent(sha256)

    def _no_longer_sent(self, sha256: bytes) -> None:
        if (sent := self._being_sent.pop(sha256, None)) is not None:
            sent.set_result(None)
