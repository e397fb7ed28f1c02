"""`PutMedia`: items that come in chunks are put together, checked and stored; one is checked while the next comes."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Sequence

from actor.media.store import MediaStore
from common.errors import DeadlineExceeded, InvalidRequest, QueueFull, TooLarge
from common.media import check_frames, check_image, media_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import Frames, ServerLimits

_MAX_CHUNK_BYTES = 2**20
_MAX_ITEMS_PER_CALL = 4096
# How long a caller that is there may take for its next chunk, and for how long it may send less than this.
_CHUNK_S = 60.0
_MIN_BYTES_PER_S = 2**16


@dataclasses.dataclass(eq=False, slots=True)
class _Upload:
    """A media item on its way here: an image file, or the frames of a video end to end."""

    sha256: bytes
    num_bytes: int
    frame_num_bytes: tuple[int, ...] = ()
    chunks: list[bytes] = dataclasses.field(default_factory=list)
    num_received: int = 0

    def append(self, chunk: bytes) -> None:
        if len(chunk) > _MAX_CHUNK_BYTES:
            raise TooLarge("chunk", f"{len(chunk)} bytes; the limit is {_MAX_CHUNK_BYTES}")
        if self.num_received + len(chunk) > self.num_bytes:
            raise InvalidRequest("chunk", f"more bytes than the {self.num_bytes} of num_bytes")
        if chunk:
            self.chunks.append(chunk)
        self.num_received += len(chunk)

    def content(self) -> bytes | Frames:
        """What has come, of which nothing is missing."""
        data = b"".join(self.chunks)
        if not self.frame_num_bytes:
            return data
        ends = list(itertools.accumulate(self.frame_num_bytes))
        return Frames(tuple(data[start:end] for start, end in itertools.pairwise([0, *ends])))


class Uploads:
    """The calls under way, which together take no more bytes than `store` holds."""

    def __init__(self, store: MediaStore, limits: ServerLimits) -> None:
        self._store = store
        self._limits = limits
        self._under_way: dict[_Upload, None] = {}

    async def receive(self, requests: AsyncIterator[pb.PutMediaRequest]) -> list[bytes]:
        """Store the items of one call; the sha256 of those that are here at its end, in the order in which they came.

        Raises InvalidRequest, TooLarge and QueueFull.
        """
        named: dict[bytes, None] = {}
        upload: _Upload | None = None
        checking: asyncio.Task[None] | None = None
        try:
            async for request, chunk in _in_time(requests):
                if request.sha256:
                    checking = await self._ended(upload, checking)
                    upload = self._begin(request)
                    named[upload.sha256] = None
                    if len(named) > _MAX_ITEMS_PER_CALL:
                        raise TooLarge("sha256", f"more than {_MAX_ITEMS_PER_CALL} items in one call")
                elif upload is None:
                    raise InvalidRequest("sha256", "is missing in the first chunk")
                self._check_room(len(chunk))
                upload.append(chunk)
            checking = await self._ended(upload, checking)
            if checking is not None:
                await checking
        finally:
            if upload is not None:
                self._under_way.pop(upload, None)
            if checking is not None:
                checking.cancel()
                await asyncio.gather(checking, return_exceptions=True)
        return [sha256 for sha256 in named if sha256 in self._store]

    async def _ended(
        self, upload: _Upload | None, checking: "asyncio.Task[None] | None"
    ) -> "asyncio.Task[None] | None":
        """The check of an item that should be here, begun once that of the item before it is done."""
        if checking is not None:
            await checking
        if upload is None:
            return None
        if upload.num_received != upload.num_bytes:
            raise InvalidRequest("num_bytes", f"is {upload.num_bytes}, but {upload.num_received} bytes came")
        checking = asyncio.create_task(self._check_and_store(upload))
        # Not in the task: one that is cancelled before it begins ends without a step.
        checking.add_done_callback(lambda _: self._under_way.pop(upload, None))
        return checking

    async def _check_and_store(self, upload: _Upload) -> None:
        content = await asyncio.to_thread(_checked, upload, self._limits)
        self._store.put(upload.sha256, content)

    def _begin(self, request: pb.PutMediaRequest) -> _Upload:
        """One item."""
        _check_frame_sizes(request.frame_num_bytes, request.num_bytes, self._limits.max_video_frames)
        upload = _Upload(request.sha256, request.num_bytes, tuple(request.frame_num_bytes))
        if len(upload.sha256) != 32:
            raise InvalidRequest("sha256", f"must be 32 bytes, not {len(upload.sha256)}")
        limit = min(self._limits.max_media_bytes, self._store.max_item_bytes)
        if upload.num_bytes > limit:
            raise TooLarge("num_bytes", f"is {upload.num_bytes}; the limit is {limit}")
        self._under_way[upload] = None
        return upload

    def _check_room(self, num_bytes: int) -> None:
        """By what has come, not by what was announced: who sends nothing keeps nobody out."""
        num_held = sum(upload.num_received for upload in self._under_way)
        if num_held + num_bytes > self._store.max_bytes:
            raise QueueFull(f"{len(self._under_way)} uploads of {num_held} bytes are under way")


async def _in_time(requests: AsyncIterator[pb.PutMediaRequest]) -> AsyncIterator[tuple[pb.PutMediaRequest, bytes]]:
    """The requests and their chunks. Raises DeadlineExceeded if they come too slowly: calls need not have a deadline.

    Waiting uses up what is left of the time, and bytes give it back; what is done with a request does not count.
    """
    left_s = _CHUNK_S
    while True:
        waits_since = time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                request = await anext(requests)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineExceeded(
                f"no chunk has come for {_CHUNK_S:g} s, or fewer than {_MIN_BYTES_PER_S} bytes/s of them"
            ) from None
        chunk = request.chunk  # a copy, each time that it is asked for
        left_s = min(_CHUNK_S, left_s - (time.monotonic() - waits_since) + len(chunk) / _MIN_BYTES_PER_S)
        yield request, chunk


def _check_frame_sizes(sizes: Sequence[int], num_bytes: int, max_frames: int) -> None:
    if len(sizes) > max_frames:
        raise TooLarge("frame_num_bytes", f"{len(sizes)} frames, more than the limit of {max_frames}")
    if sizes and sum(sizes) != num_bytes:
        raise InvalidRequest("frame_num_bytes", f"make {sum(sizes)} bytes; num_bytes is {num_bytes}")


def _checked(upload: _Upload, limits: ServerLimits) -> bytes | Frames:
    """The item, whose hash and headers are right; runs in a thread."""
    content = upload.content()
    if media_hash(content) != upload.sha256:
        raise InvalidRequest(
            "sha256", f"{upload.sha256.hex()} is not the hash of the {upload.num_bytes} bytes that came"
        )
    if isinstance(content, Frames):
        check_frames(content, "chunk", limits.max_video_frames, limits.max_media_pixels)
    else:
        check_image(content, "chunk", limits.max_media_pixels)
    return content
