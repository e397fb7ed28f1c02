"""What a request says about its media becomes what an engine takes: looked up by hash, verified, decoded, stored."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from PIL import Image

from actor.engine import EngineMedia
from actor.media_store import MediaStore, content_bytes
from actor.metrics import ActorMetrics
from common import tracing
from common.errors import InvalidRequest, MediaMissing, QueueFull, TooLarge
from common.media import check_image, content_hash, decode_image
from common.tensors import NamedTensor, Tensor, pixels_hash, tensors_hash
from common.types import MediaContent, MediaItem, ServerLimits

_RETRY_AFTER_S = 0.5


class MediaIntake:
    """Takes the media of requests that have been checked. `store` keeps what fits.

    `max_held_bytes` bounds the media of all requests under way, as they came and decoded.
    """

    def __init__(self, store: MediaStore, limits: ServerLimits, metrics: ActorMetrics, max_held_bytes: int) -> None:
        self._store = store
        self._limits = limits
        self._metrics = metrics
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0

    @asynccontextmanager
    async def taken(self, media: tuple[MediaItem, ...]) -> AsyncIterator[tuple[EngineMedia, ...]]:
        """Resolve, verify and decode; they count as held for as long as the block runs.

        Raises MediaMissing with every hash that is not stored here, InvalidRequest, TooLarge, and QueueFull before
        anything is decoded that there is no room for.
        """
        if not media:
            yield ()
            return
        contents = self._contents(media)
        max_pixels = self._limits.max_media_pixels
        num_bytes = await asyncio.to_thread(_bytes_to_hold, contents, max_pixels)
        if num_bytes > self._max_held_bytes:
            raise TooLarge("media", f"{num_bytes} bytes with what they decode to; the limit is {self._max_held_bytes}")
        if self._held_bytes + num_bytes > self._max_held_bytes:
            raise QueueFull(_RETRY_AFTER_S, f"media of {self._held_bytes} bytes are held for the requests under way")
        self._held_bytes += num_bytes
        try:
            with tracing.span("actor.decode_media", num_items=len(media)):
                decoded = await asyncio.to_thread(_decode, media, contents, max_pixels)
            for item, content in zip(decoded, contents, strict=True):
                if content_bytes(content) <= self._store.max_bytes:
                    self._store.put(item.sha256, content)
            yield decoded
        finally:
            self._held_bytes -= num_bytes

    def _contents(self, media: tuple[MediaItem, ...]) -> list[MediaContent]:
        contents: list[MediaContent] = []
        missing: dict[bytes, None] = {}
        for item in media:
            content = item.content or self._store.get(item.sha256)
            source = "sent" if item.content else "stored" if content else "missing"
            self._metrics.media.labels(source).inc()
            if content is None:
                missing[item.sha256] = None
            else:
                contents.append(content)
        if missing:
            raise MediaMissing(tuple(missing))
        return contents


def _bytes_to_hold(contents: list[MediaContent], max_pixels: int) -> int:
    """As they came, and three bytes for each pixel of a file; from the headers alone."""
    num_bytes = sum(map(content_bytes, contents))
    for i, content in enumerate(contents):
        if isinstance(content, bytes):
            header = check_image(content, f"media[{i}].encoded", max_pixels)
            num_bytes += 3 * header.width * header.height
    return num_bytes


def _decode(media: tuple[MediaItem, ...], contents: list[MediaContent], max_pixels: int) -> tuple[EngineMedia, ...]:
    """Hashes and images; runs in a thread."""
    decoded = []
    for i, (item, content) in enumerate(zip(media, contents, strict=True)):
        field = f"media[{i}]"
        actual = _hash(content) if item.content is not None else item.sha256
        if item.sha256 and item.sha256 != actual:
            raise InvalidRequest(f"{field}.sha256", f"is {item.sha256.hex()}, but the bytes hash to {actual.hex()}")
        decoded.append(
            EngineMedia(actual, _decode_content(item, content, field, max_pixels), item.min_pixels, item.max_pixels)
        )
    return tuple(decoded)


def _hash(content: MediaContent) -> bytes:
    if isinstance(content, bytes):
        return content_hash(content)
    return pixels_hash(content) if isinstance(content, Tensor) else tensors_hash(content)


def _decode_content(
    item: MediaItem, content: MediaContent, field: str, max_pixels: int
) -> Image.Image | tuple[NamedTensor, ...]:
    if isinstance(content, bytes):
        return decode_image(content, f"{field}.encoded", max_pixels)
    if isinstance(content, Tensor):
        return Image.fromarray(content.array())
    if item.min_pixels is not None or item.max_pixels is not None:
        raise InvalidRequest(f"{field}.processor", "has no effect on processed tensors")
    for j, named in enumerate(content):
        if not np.isfinite(named.tensor.widened()).all():
            raise InvalidRequest(f"{field}.processed.tensors[{j}].tensor.data", "has a value that is not finite")
    return content
