"""Decoded images and videos by sha256, so that the same file is decoded once, however many groups use it."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from PIL import Image

from actor.engine import VideoArray
from actor.media.store import ITEM_BYTES
from common.errors import OutriderError

T = TypeVar("T", Image.Image, VideoArray)


class DecodedMedia:
    """A least-recently-used cache, bounded by the sum of their bytes. For threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._items: OrderedDict[bytes, Future[Image.Image] | Future[VideoArray]] = OrderedDict()

    def get(self, sha256: bytes, decode: Callable[[], T]) -> T:
        """What `decode` gives, or gave. Of threads that ask for the same at once, one decodes and the others wait."""
        mine: Future[T] = Future()
        with self._lock:
            found = self._items.setdefault(sha256, mine)
            self._items.move_to_end(sha256)
        if found is not mine:
            try:
                return found.result()  # type: ignore[return-value]
            except OutriderError:
                return decode()  # its error names the field of this request
        try:
            content = decode()
        except BaseException as error:
            with self._lock:
                if self._items.get(sha256) is mine:
                    del self._items[sha256]
            mine.set_exception(error)
            raise
        with self._lock:
            mine.set_result(content)  # here, so that whoever evicts what is done finds it counted
            if self._items.get(sha256) is mine:
                self._num_bytes += _num_bytes(content)
            while self._num_bytes > self._max_bytes:
                _, dropped = self._items.popitem(last=False)
                self._num_bytes -= _num_bytes(dropped.result()) if dropped.done() else 0
        return content


def _num_bytes(content: Image.Image | VideoArray) -> int:
    """As it is in memory: PIL keeps four bytes of each RGB pixel."""
    pixels = 4 * content.width * content.height if isinstance(content, Image.Image) else content.nbytes
    return pixels + ITEM_BYTES
