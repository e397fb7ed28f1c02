"""Encoded media by sha256, so that an image crosses the network once per actor and not once per request."""

from collections import OrderedDict

from common.errors import TooLarge


class MediaStore:
    """A least-recently-used cache of media files, bounded by the sum of their bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, sha256: bytes) -> bytes | None:
        """The bytes, which then count as just used; None if they are not here."""
        data = self._items.get(sha256)
        if data is not None:
            self._items.move_to_end(sha256)
        return data

    def put(self, sha256: bytes, data: bytes) -> None:
        """Keep `data`, whose hash the caller has checked; drops the least recently used ones to make room.

        Raises TooLarge if the store is smaller than the item.
        """
        if len(data) > self.max_bytes:
            raise TooLarge("chunk", f"an item of {len(data)} bytes; the media store holds {self.max_bytes} bytes")
        if self.get(sha256) is not None:
            return
        self._items[sha256] = data
        self.num_bytes += len(data)
        while self.num_bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.num_bytes -= len(dropped)

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._items

    def __len__(self) -> int:
        return len(self._items)
