"""Media by sha256, so that an image crosses the network once per actor and not once per request."""

from collections import OrderedDict

from common.errors import TooLarge
from common.tensors import Tensor
from common.types import Frames, MediaContent

# Of every item that is kept, beside its content: objects, a key, an entry. An image of one pixel takes more than half.
ITEM_BYTES = 4096


class MediaStore:
    """A least-recently-used cache of what media items hold, bounded by the sum of their bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[bytes, MediaContent] = OrderedDict()

    @property
    def max_item_bytes(self) -> int:
        """What the content of one item may have."""
        return max(0, self.max_bytes - ITEM_BYTES)

    def get(self, sha256: bytes) -> MediaContent | None:
        """The content, which then count as just used; None if they are not here."""
        data = self._items.get(sha256)
        if data is not None:
            self._items.move_to_end(sha256)
        return data

    def put(self, sha256: bytes, data: MediaContent) -> None:
        """Keep `data`, whose hash the caller has checked; drops the least recently used ones to make room.

        Raises TooLarge if the store is smaller than the item.
        """
        size = content_bytes(data)
        if size > self.max_item_bytes:
            raise TooLarge("chunk", f"an item of {size} bytes; the media store takes {self.max_item_bytes}")
        if self.get(sha256) is not None:
            return
        self._items[sha256] = data
        self.num_bytes += size + ITEM_BYTES
        while self.num_bytes > self.max_bytes:
            _, dropped = self._items.popitem(last=False)
            self.num_bytes -= content_bytes(dropped) + ITEM_BYTES

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._items

    def __len__(self) -> int:
        return len(self._items)


def content_bytes(content: MediaContent) -> int:
    """Bytes of a file, of all frames, of pixels, or of all tensors."""
    if isinstance(content, bytes):
        return len(content)
    if isinstance(content, Frames):
        return sum(map(len, content.files))
    if isinstance(content, Tensor):
        return len(content.data)
    return sum(len(named.tensor.data) for named in content)
