"""What the fuzzer calls: from bytes on a socket to the point where the engine would get them.

A target returns, or raises one of the typed errors that it lets pass; anything else is a find.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image

from actor.media import intake as media_intake
from actor.media.decoded import DecodedMedia
from actor.media.store import MediaStore
from actor.media.uploads import Uploads
from actor.validation.request import check_request
from common import wire
from common.errors import InvalidRequest, QueueFull, TooLarge, Unimplemented
from common.media import media_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.pb.weights.v1 import weights_pb2
from common.rpc import interceptors
from common.types import ServerLimits

LIMITS = ServerLimits(
    max_group_size=16,
    max_context_tokens=64,
    max_media_items=4,
    max_videos=2,
    max_media_bytes=2**16,
    max_media_pixels=2**12,
)
_VOCAB_SIZE = 320
_REFUSED = (InvalidRequest, TooLarge, Unimplemented, DecodeError)
_RUNNER = asyncio.Runner()


def generate(data: bytes) -> None:
    """A `GenerateRequest`: parse, validate, decode its media."""
    try:
        wire.check_bounds(data, pb.GenerateRequest.DESCRIPTOR)
        request = wire.request_from_proto(pb.GenerateRequest.FromString(data))
        check_request(request, LIMITS, _VOCAB_SIZE, (1,))
        pairs = [(item, item.content) for item in request.media if item.content is not None]
        media, contents = tuple(item for item, _ in pairs), [content for _, content in pairs]
        media_intake._bytes_to_hold(media, contents, LIMITS)
        decoded = media_intake._decode(media, contents, LIMITS, DecodedMedia(max_bytes=2**20))
    except _REFUSED:
        return
    for item in decoded:
        if num_pixels(item.content) > LIMITS.max_media_pixels:
            raise AssertionError(f"decoded {num_pixels(item.content)} pixels")


def num_pixels(content: Any) -> int:
    """Of an image, or of all frames of a video; 0 for tensors."""
    if isinstance(content, Image.Image):
        return content.width * content.height
    return math.prod(content.shape[:-1]) if isinstance(content, np.ndarray) else 0


def stage(data: bytes) -> None:
    """A `StageRequest`: parse, validate the manifest."""
    try:
        wire.check_bounds(data, weights_pb2.StageRequest.DESCRIPTOR)
        manifest = wire.manifest_from_proto(weights_pb2.StageRequest.FromString(data).manifest)
    except _REFUSED:
        return
    if manifest != wire.manifest_from_proto(wire.manifest_to_proto(manifest)):
        raise AssertionError("a manifest that was taken does not come back")


def upload(data: bytes) -> None:
    """A stream of `PutMediaRequest`, each one a file of an `EncodedFrames`: put together, check, store."""
    store = MediaStore(2**17)
    uploads = Uploads(store, LIMITS)
    try:
        messages = pb.EncodedFrames.FromString(data).files
        _RUNNER.run(uploads.receive(interceptors._parsing_each(pb.PutMediaRequest.FromString)(_sent(messages))))
    except (*_REFUSED, QueueFull):
        pass
    if uploads._under_way:
        raise AssertionError("a call that has ended holds room")
    for sha256, content in store._items.items():
        if media_hash(content) != sha256:
            raise AssertionError("stored under another name")


async def _sent(messages: Iterable[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def planted(data: bytes) -> None:
    """Has a mistake: for a good request that no seed is, it raises what it must not."""
    try:
        request = wire.request_from_proto(pb.GenerateRequest.FromString(data))
        check_request(request, LIMITS, _VOCAB_SIZE, (1,))
    except _REFUSED:
        return
    if request.group_id != "g":
        raise RuntimeError("planted")
