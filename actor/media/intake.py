"""What a request says about its media becomes what an engine takes: looked up by hash, verified, decoded, stored."""

import asyncio
import functools
import math
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from PIL import Image

from actor.engine import EngineMedia, VideoArray
from actor.media.decoded import DecodedMedia
from actor.media.store import MediaStore, content_bytes
from actor.metrics import ActorMetrics
from common import tracing
from common.errors import InvalidRequest, MediaMissing, QueueFull, TooLarge
from common.media import check_frames, check_image, decode_frames, decode_image, media_hash
from common.tensors import NamedTensor, Tensor
from common.types import Frames, MediaContent, MediaItem, Modality, ServerLimits


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
        self._lock = threading.Lock()  # of what is held: a thread that nobody waits for any more releases it
        self._decoded = DecodedMedia(store.max_bytes)
        self._threads = ThreadPoolExecutor(thread_name_prefix="decode")

    @asynccontextmanager
    async def taken(self, media: tuple[MediaItem, ...]) -> AsyncIterator[tuple[EngineMedia, ...]]:
        """Resolve, verify and decode; they count as held for as long as the block runs, and a thread decodes.

        Raises MediaMissing with every hash that is not stored here, InvalidRequest, TooLarge, and QueueFull before
        anything is decoded that there is no room for.
        """
        if not media:
            yield ()
            return
        contents = self._contents(media)
        num_bytes = await asyncio.to_thread(_bytes_to_hold, media, contents, self._limits)
        if num_bytes > self._max_held_bytes:
            raise TooLarge("media", f"{num_bytes} bytes with what they decode to; the limit is {self._max_held_bytes}")
        if self._held_bytes + num_bytes > self._max_held_bytes:
            raise QueueFull(f"media of {self._held_bytes} bytes are held for the requests under way")
        self._hold(num_bytes)
        decoding = self._threads.submit(_decode, media, contents, self._limits, self._decoded)
        try:
            with tracing.span("actor.decode_media", num_items=len(media)):
                decoded = await asyncio.wrap_future(decoding)
            for item, content in zip(decoded, contents, strict=True):
                if content_bytes(content) <= self._store.max_item_bytes:
                    self._store.put(item.sha256, content)
            yield decoded
        finally:
            decoding.add_done_callback(lambda _: self._hold(-num_bytes))

    def _hold(self, num_bytes: int) -> None:
        with self._lock:
            self._held_bytes += num_bytes

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


def _bytes_to_hold(media: tuple[MediaItem, ...], contents: list[MediaContent], limits: ServerLimits) -> int:
    """As they came, and what they decode to; from the headers alone.

    What comes with the request itself is there twice: gRPC keeps the message. Pillow has four bytes for a pixel, and
    the processor may make more pixels of an image, or of each frame, than it has.
    """
    num_bytes = 0
    for i, (item, content) in enumerate(zip(media, contents, strict=True)):
        num_bytes += content_bytes(content) * (1 if item.content is None else 2)
        num_frames, num_pixels = 1, 0
        if isinstance(content, bytes):
            header = check_image(content, f"media[{i}].encoded", limits.max_media_pixels)
            num_pixels = header.width * header.height
        elif isinstance(content, Frames):
            header = check_frames(content, f"media[{i}].frames", limits.max_video_frames, limits.max_media_pixels)
            num_frames, num_pixels = len(content.files), header.width * header.height
        elif isinstance(content, Tensor):
            *frames, height, width, _ = content.shape
            num_frames, num_pixels = math.prod(frames), height * width
        num_bytes += 4 * num_frames * max(num_pixels, item.min_pixels or 0)
    return num_bytes


def _decode(
    media: tuple[MediaItem, ...], contents: list[MediaContent], limits: ServerLimits, cache: DecodedMedia
) -> tuple[EngineMedia, ...]:
    """Hashes, images and videos; runs in a thread."""
    decoded = []
    for i, (item, content) in enumerate(zip(media, contents, strict=True)):
        field = f"media[{i}]"
        actual = media_hash(content) if item.content is not None else item.sha256
        if item.sha256 and item.sha256 != actual:
            raise InvalidRequest(f"{field}.sha256", f"is {item.sha256.hex()}, but the bytes hash to {actual.hex()}")
        _check_modality(item.modality, content, f"{field}.modality")
        if isinstance(content, bytes | Frames):
            pixels = cache.get(actual, functools.partial(_decode_files, content, field, limits))
        else:
            pixels = _checked(item, content, field)
        decoded.append(
            EngineMedia(
                actual,
                pixels,
                item.min_pixels,
                item.max_pixels,
                item.modality,
                item.frames_per_second,
            )
        )
    return tuple(decoded)


def _decode_files(content: bytes | Frames, field: str, limits: ServerLimits) -> Any:
    if isinstance(content, bytes):
        return decode_image(content, f"{field}.encoded", limits.max_media_pixels)
    return decode_frames(content, f"{field}.frames", limits.max_video_frames, limits.max_media_pixels)


def _checked(
    item: MediaItem, content: Tensor | tuple[NamedTensor, ...], field: str
) -> Image.Image | VideoArray | tuple[NamedTensor, ...]:
    """What needs no decoding."""
    if isinstance(content, Tensor):
        pixels: VideoArray = content.array().astype(np.uint8, copy=False)
        return Image.fromarray(pixels) if item.modality is Modality.IMAGE else pixels
    if item.min_pixels is not None or item.max_pixels is not None:
        raise InvalidRequest(f"{field}.processor", "has no effect on processed tensors")
    if item.frames_per_second is not None:
        raise InvalidRequest(f"{field}.frames_per_second", "has no effect on processed tensors")
    for j, named in enumerate(content):
        if not np.isfinite(named.tensor.widened()).all():
            raise InvalidRequest(f"{field}.processed.tensors[{j}].tensor.data", "has a value that is not finite")
    return content


def _check_modality(modality: Modality, content: MediaContent, field: str) -> None:
    """What is stored under a hash need not be what the request takes it for."""
    if isinstance(content, tuple):
        return  # the names of the tensors tell, when the model takes them
    is_image = isinstance(content, bytes) or (isinstance(content, Tensor) and len(content.shape) == 3)
    if is_image is not (modality is Modality.IMAGE):
        raise InvalidRequest(
            field, f"is {modality.value}, but this sha256 is that of {'an image' if is_image else 'a video'}"
        )
