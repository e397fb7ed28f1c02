"""Videos over a real socket, with the fake engine."""

import asyncio
import dataclasses
from typing import Any

import grpc
import numpy as np
import pytest

from actor.media import intake as media_intake
from common.client import GrpcClient
from common.errors import InvalidRequest, MediaMissing, OutriderError, TooLarge
from common.media import content_hash, frames_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.tensors import Tensor, pixels_hash, tensor_of
from common.types import (
    ChatMessage,
    ChatPrompt,
    Frames,
    MediaItem,
    MediaPart,
    Modality,
    PlaceholderRange,
    RolloutRequest,
    SamplingParams,
    TextPart,
    TextPrompt,
    TokenPrompt,
)
from tests.helpers.fake_actors import StartActor, png

FAST = {"token_s": 0.0, "tokens_per_image": 3, "max_videos": 2, "max_video_frames": 4}
FRAMES = Frames(tuple(png(seed) for seed in range(3)))
PIXELS = tensor_of(np.random.default_rng(0).integers(0, 255, (2, 6, 4, 3), dtype=np.uint8))
IN_FILES = MediaItem(frames_hash(FRAMES), modality=Modality.VIDEO, frames=FRAMES, frames_per_second=2.0)
IN_PIXELS = MediaItem(pixels_hash(PIXELS), modality=Modality.VIDEO, pixels=PIXELS)


def _request(*media: MediaItem, **values: Any) -> RolloutRequest:
    return RolloutRequest(
        **(
            {"group_id": "g", "prompt": TextPrompt("hi"), "media": media, "sampling": SamplingParams(max_tokens=4)}
            | values
        )
    )


async def _ask(address: str, request: RolloutRequest) -> Any:
    client = GrpcClient(address)
    try:
        return [event async for event in client.stream(request, timeout_s=10)]
    finally:
        await client.close()


@pytest.mark.parametrize("inline_max_bytes", [2**20, 0], ids=["inline", "uploaded"])
async def test_videos_cross_once(start_actor: StartActor, inline_max_bytes: int) -> None:
    actor = await start_actor(fake=FAST)
    by_hash = _request(IN_FILES.by_hash(), IN_PIXELS.by_hash(), return_processed=True)
    with pytest.raises(MediaMissing) as missing:
        await _ask(actor.address, by_hash)
    assert missing.value.sha256s == (IN_FILES.sha256, IN_PIXELS.sha256)
    client = GrpcClient(actor.address, inline_max_bytes=inline_max_bytes)
    request = _request(IN_FILES, IN_PIXELS, return_processed=True)
    groups = [await client.generate(request, timeout_s=10) for _ in range(2)]
    assert (await client._prepare(request, 10, 0)).media == by_hash.media
    await client.close()
    for group in groups:
        assert [use.sha256 for use in group.prompt.media] == [IN_FILES.sha256, IN_PIXELS.sha256]
        assert [use.modality for use in group.prompt.media] == [Modality.VIDEO] * 2
        # The fake engine: what it saw, and three tokens for each frame.
        seen = [use.processed[0].tensor for use in group.prompt.media]
        assert (seen[0].shape, seen[1]) == ((3, 8, 8, 3), PIXELS)
        assert [use.num_tokens for use in group.prompt.media] == [9, 6]
        assert [use.grid_thw[0] for use in group.prompt.media] == [3, 2]


async def test_files_are_decoded_once(start_actor: StartActor, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many groups use them, at once and one after the other."""
    actor = await start_actor(fake=FAST)
    decoded: list[str] = []
    for name in ("decode_image", "decode_frames"):
        decode = getattr(media_intake, name)

        def counted(content: Any, *options: Any, _decode: Any = decode, _name: str = name) -> Any:
            decoded.append(_name)
            return _decode(content, *options)

        monkeypatch.setattr(media_intake, name, counted)
    image = MediaItem(content_hash(png(9)), png(9))
    await asyncio.gather(*(_ask(actor.address, _request(image, IN_FILES)) for _ in range(4)))
    await _ask(actor.address, _request(image.by_hash(), IN_FILES.by_hash()))
    assert sorted(decoded) == ["decode_frames", "decode_image"]
    await _ask(actor.address, _request(MediaItem(b"", png(10))))
    assert sorted(decoded) == ["decode_frames", "decode_image", "decode_image"]


async def test_a_chat_places_a_video_beside_an_image(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    image = MediaItem(b"", png(9))
    chat = ChatPrompt((ChatMessage("u", (MediaPart(0), TextPart("and"), MediaPart(1))),))
    info = (await _ask(actor.address, _request(image, IN_FILES, prompt=chat)))[0]
    assert [(use.placeholder.offset, use.placeholder.length) for use in info.media] == [(1, 3), (7, 9)]
    assert [use.modality for use in info.media] == [Modality.IMAGE, Modality.VIDEO]
    tokens = TokenPrompt((7, *[1] * 9, 8), (PlaceholderRange(1, 9),))
    assert (await _ask(actor.address, _request(IN_FILES, prompt=tokens)))[0].expanded_ids.tolist() == list(tokens.ids)


async def test_limits_are_told(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    client = GrpcClient(actor.address)
    limits = (await client.server_info()).limits
    await client.close()
    assert (limits.max_videos, limits.max_video_frames) == (2, 4)


@pytest.mark.parametrize(
    ("item", "kind", "problem"),
    [
        (
            MediaItem(b"", modality=Modality.VIDEO, frames=Frames(())),
            InvalidRequest,
            "media[0].frames.files: is empty",
        ),
        (
            MediaItem(b"", modality=Modality.VIDEO, frames=Frames((png(), b"no image"))),
            InvalidRequest,
            "media[0].frames.files[1]: not an image in PNG, JPEG or WebP format",
        ),
        (
            MediaItem(b"", modality=Modality.VIDEO, frames=Frames((png(), png(1, size=9)))),
            InvalidRequest,
            "media[0].frames.files[1]: 9x9 pixels; the first frame has 8x8",
        ),
        (
            MediaItem(b"", modality=Modality.VIDEO, frames=Frames((png(size=2),) * 5)),
            TooLarge,
            "media[0].frames.files: 5 frames, more than the limit of 4",
        ),
        (
            MediaItem(b"", modality=Modality.VIDEO, frames=Frames((png(),) * 4)),
            TooLarge,
            "media[0].frames.files: 4 frames of 8x8 pixels, more than the limit of 200",
        ),
        (
            MediaItem(bytes(32), modality=Modality.VIDEO, frames=FRAMES),
            InvalidRequest,
            f"media[0].sha256: is {'00' * 32}, but the bytes hash to {frames_hash(FRAMES).hex()}",
        ),
        (
            MediaItem(b"", modality=Modality.VIDEO, pixels=tensor_of(np.zeros((5, 2, 2, 3), np.uint8))),
            TooLarge,
            "media[0].pixels: 5 frames, more than the limit of 4",
        ),
        (
            MediaItem(b"", modality=Modality.VIDEO, pixels=tensor_of(np.zeros((3, 17, 4, 3), np.uint8))),
            TooLarge,
            "media[0].pixels: 3x4x17 pixels, more than the limit of 200",
        ),
        *(
            (
                MediaItem(b"", modality=Modality.VIDEO, pixels=Tensor("U8", shape, data)),
                InvalidRequest,
                f"media[0].pixels.shape: is {list(shape)}; must be [frames, height, width, 3]",
            )
            for shape, data in (((2, 2, 3), bytes(12)), ((1, 1, 1, 4), bytes(4)), ((0, 2, 2, 3), b""))
        ),
        (
            MediaItem(b"", pixels=tensor_of(np.zeros((1, 2, 2, 3), np.uint8))),
            InvalidRequest,
            "media[0].pixels.shape: is [1, 2, 2, 3]; must be [height, width, 3]",
        ),
    ],
)
async def test_what_is_wrong_is_named(
    start_actor: StartActor, item: MediaItem, kind: type[OutriderError], problem: str
) -> None:
    actor = await start_actor(fake=FAST, limits={"max_media_pixels": 200})
    with pytest.raises(kind) as refused:
        await _ask(actor.address, _request(item))
    assert str(refused.value) == problem
    assert len(await _ask(actor.address, _request(IN_PIXELS))) == 2


async def test_what_frames_are_made_larger_to_is_held_too(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST, limits={"max_held_media_bytes": 8 * 2**20})
    for item in (IN_FILES, IN_PIXELS):  # of 3 and 2 frames
        await _ask(actor.address, _request(dataclasses.replace(item, min_pixels=2**19, max_pixels=2**20)))
        with pytest.raises(TooLarge, match=r"media: \d+ bytes with what they decode to; the limit is 8388608"):
            await _ask(actor.address, _request(dataclasses.replace(item, min_pixels=2**20, max_pixels=2**20)))


async def test_a_hash_of_the_other_modality(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    image = MediaItem(content_hash(png()), png())
    await _ask(actor.address, _request(image, IN_FILES, IN_PIXELS))
    for item, problem in (
        (
            dataclasses.replace(image.by_hash(), modality=Modality.VIDEO),
            "is video, but this sha256 is that of an image",
        ),
        (MediaItem(IN_FILES.sha256), "is image, but this sha256 is that of a video"),
        (MediaItem(IN_PIXELS.sha256), "is image, but this sha256 is that of a video"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await _ask(actor.address, _request(item))
        assert str(refused.value) == f"media[0].modality: {problem}"


async def test_an_upload_that_does_not_add_up(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    files = b"".join(FRAMES.files)
    sizes = [len(file) for file in FRAMES.files]

    async def put(**values: Any) -> str:
        given = {"sha256": IN_FILES.sha256, "num_bytes": len(files), "frame_num_bytes": sizes, "chunk": files}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await actor.rollouts.PutMedia(iter([pb.PutMediaRequest(**(given | values))]))
        return str(refused.value.details())

    total = len(files)
    assert await put(frame_num_bytes=[*sizes, 1]) == f"frame_num_bytes: make {total + 1} bytes; num_bytes is {total}"
    assert await put(frame_num_bytes=[total - 4, 1, 1, 1, 1]) == "frame_num_bytes: 5 frames, more than the limit of 4"
    # The same bytes cut elsewhere are another video; and no images.
    moved = [sizes[0] + 1, sizes[1] - 1, sizes[2]]
    assert await put(frame_num_bytes=moved) == (
        f"sha256: {IN_FILES.sha256.hex()} is not the hash of the {total} bytes that came"
    )
    cut = Frames((files[: moved[0]], files[moved[0] : moved[0] + moved[1]], FRAMES.files[2]))
    assert "files[1]: not an image" in await put(frame_num_bytes=moved, sha256=frames_hash(cut))
    with pytest.raises(MediaMissing):
        await _ask(actor.address, _request(IN_FILES.by_hash()))
