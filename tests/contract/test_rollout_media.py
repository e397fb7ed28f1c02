"""Media that are no files, over a real socket, with the fake engine."""

import asyncio
import dataclasses
import io
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actor.media import intake as media_intake
from common.client import GrpcClient
from common.errors import InvalidRequest, MediaMissing, OutriderError, QueueFull, TooLarge
from common.media import content_hash
from common.tensors import NamedTensor, Tensor, pixels_hash, tensor_of, tensors_hash
from common.types import (
    MediaItem,
    Modality,
    PlaceholderRange,
    RolloutRequest,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from tests.helpers.fake_actors import StartActor, png
from tests.helpers.fakes import until

FAST = {"token_s": 0.0, "tokens_per_image": 3}
PIXELS = tensor_of(np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8))
TENSORS = (
    NamedTensor("pixel_values", tensor_of(np.arange(8, dtype=np.float32).reshape(4, 2))),
    NamedTensor("image_grid_thw", tensor_of(np.array([[1, 2, 2]], np.int64))),
    NamedTensor("mask", Tensor("BF16", (2,), b"\x80\x3f\0\0")),
)


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


async def test_times_count_from_before_the_media_are_decoded(
    start_actor: StartActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return decode(*arguments)

    decode = media_intake._decode
    monkeypatch.setattr(media_intake, "_decode", decode_slowly)
    actor = await start_actor(fake=FAST)
    _, [completion] = await _ask(actor.address, _request(MediaItem(pixels_hash(PIXELS), pixels=PIXELS)))
    assert 0.3 <= completion.first_token_s <= completion.finished_s


async def test_pixels_and_tensors_cross_once(start_actor: StartActor) -> None:
    """Sent, then named by hash only, by a client that knows what the actor has; and by one that is wrong about it."""
    actor = await start_actor(fake=FAST)
    media = (
        MediaItem(pixels_hash(PIXELS), pixels=PIXELS),
        MediaItem(tensors_hash(TENSORS), processed=TENSORS),
    )
    by_hash = _request(*(item.by_hash() for item in media), return_processed=True)
    with pytest.raises(MediaMissing) as missing:
        await _ask(actor.address, by_hash)
    assert missing.value.sha256s == tuple(item.sha256 for item in media)
    client = GrpcClient(actor.address)
    request = _request(*media, return_processed=True)
    first = await client.generate(request, timeout_s=10)
    assert (await client._prepare(request, 10, 0)).media == by_hash.media
    second = await client.generate(request, timeout_s=10)
    await client.close()
    for group in (first, second):
        assert [use.sha256 for use in group.prompt.media] == [item.sha256 for item in media]
        assert group.prompt.media[1].processed == TENSORS
        [pixels] = group.prompt.media[0].processed  # of the fake engine: what it saw
        assert pixels.tensor == PIXELS
    assert (await _ask(actor.address, _request(*media)))[0].media[1].processed == ()


@pytest.mark.parametrize(
    ("item", "kind", "problem"),
    [
        (
            MediaItem(b"", pixels=dataclasses.replace(PIXELS, shape=(6, 12))),
            InvalidRequest,
            "media[0].pixels.shape: is [6, 12]; must be [height, width, 3]",
        ),
        (
            MediaItem(b"", pixels=dataclasses.replace(PIXELS, shape=(3, 4, 6))),
            InvalidRequest,
            "media[0].pixels.shape: is [3, 4, 6]; must be [height, width, 3]",
        ),
        (
            MediaItem(b"", pixels=Tensor("U8", (0, 4, 3), b"")),
            InvalidRequest,
            "media[0].pixels.shape: is [0, 4, 3]; must be [height, width, 3]",
        ),
        (
            MediaItem(b"", pixels=tensor_of(np.zeros((2, 2, 3), np.float32))),
            InvalidRequest,
            "media[0].pixels.dtype: must be DTYPE_UINT8",
        ),
        (
            MediaItem(b"", pixels=tensor_of(np.zeros((17, 16, 3), np.uint8))),
            TooLarge,
            "media[0].pixels: 16x17 pixels, more than the limit of 256",
        ),
        (
            MediaItem(bytes(32), pixels=PIXELS),
            InvalidRequest,
            f"media[0].sha256: is {'00' * 32}, but the bytes hash to {pixels_hash(PIXELS).hex()}",
        ),
        (
            MediaItem(b"", processed=(NamedTensor("x", tensor_of(np.zeros(251, np.float32))),)),
            TooLarge,
            "media[0].processed: 1004 bytes; the limit is 1000",
        ),
        (
            MediaItem(b"", processed=(TENSORS[1], NamedTensor("x", tensor_of(np.array([0, np.nan]))))),
            InvalidRequest,
            "media[0].processed.tensors[1].tensor.data: has a value that is not finite",
        ),
        (
            MediaItem(b"", processed=(NamedTensor("x", Tensor("BF16", (1,), b"\x80\x7f")),)),
            InvalidRequest,
            "media[0].processed.tensors[0].tensor.data: has a value that is not finite",
        ),
        (
            MediaItem(b"", encoded=png(1), max_pixels=257),
            InvalidRequest,
            "media[0].processor.max_pixels: is 257; must be 1 to 256",
        ),
        (
            MediaItem(b"", encoded=png(1), min_pixels=0),
            InvalidRequest,
            "media[0].processor.min_pixels: is 0; must be 1 to 256",
        ),
        (
            MediaItem(b"", encoded=png(1), min_pixels=9, max_pixels=8),
            InvalidRequest,
            "media[0].processor.min_pixels: is 9, more than max_pixels: 8",
        ),
    ],
)
async def test_what_is_wrong_is_named(
    start_actor: StartActor, item: MediaItem, kind: type[OutriderError], problem: str
) -> None:
    actor = await start_actor(fake=FAST, limits={"max_media_pixels": 256, "max_media_bytes": 1000})
    with pytest.raises(kind) as refused:
        await _ask(actor.address, _request(item))
    assert str(refused.value) == problem
    assert len(await _ask(actor.address, _request(MediaItem(b"", pixels=PIXELS)))) == 2


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"min_pixels": 5}, "processor"),
        ({"max_pixels": 5}, "processor"),
        ({"modality": Modality.VIDEO, "frames_per_second": 1.0}, "frames_per_second"),
    ],
)
async def test_options_on_tensors(start_actor: StartActor, options: dict[str, Any], field: str) -> None:
    """As they come, and stored."""
    actor = await start_actor(fake=FAST)
    await _ask(actor.address, _request(MediaItem(b"", processed=TENSORS)))
    for content in ({"sha256": b"", "processed": TENSORS}, {"sha256": tensors_hash(TENSORS)}):
        with pytest.raises(InvalidRequest) as refused:
            await _ask(actor.address, _request(MediaItem(**content, **options)))
        assert str(refused.value) == f"media[0].{field}: has no effect on processed tensors"


async def test_expanded_prompts(start_actor: StartActor) -> None:
    actor = await start_actor(fake=FAST)
    item = MediaItem(b"", pixels=PIXELS)
    tokens = TokenPrompt((7, 1, 1, 1, 8), (PlaceholderRange(1, 3),))
    info = (await _ask(actor.address, _request(item, prompt=tokens)))[0]
    assert (info.expanded_ids.tolist(), info.unexpanded_ids.tolist()) == ([7, 1, 1, 1, 8], [])
    assert info.media[0].placeholder == PlaceholderRange(1, 3)
    unexpanded = (await _ask(actor.address, _request(item, prompt=TokenPrompt((7, 1, 8)))))[0]
    assert unexpanded.expanded_ids.tolist() == [7, 1, 1, 1, 8]
    for runs, problem in (
        ((PlaceholderRange(1, 2),), "tokens.placeholders[0]: is 2 tokens at 1; the processor yields 3 for media[0]"),
        ((PlaceholderRange(2, 3),), "tokens.placeholders[0]: is 3 tokens at 2; the processor yields 3 for media[0]"),
        ((PlaceholderRange(4, 3),), "tokens.placeholders[0]: ends at 7; there are 5 ids"),
        ((PlaceholderRange(1, 0),), "tokens.placeholders[0].length: is 0"),
        ((PlaceholderRange(1, 3),) * 2, "tokens.placeholders: 2 ranges for 1 media items"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await _ask(actor.address, _request(item, prompt=TokenPrompt(tokens.ids, runs)))
        assert str(refused.value) == problem
    runs = (PlaceholderRange(1, 3), PlaceholderRange(3, 1))
    with pytest.raises(InvalidRequest) as refused:
        await _ask(actor.address, _request(item, item, prompt=TokenPrompt(tokens.ids, runs)))
    assert str(refused.value) == "tokens.placeholders[1].offset: is 3, before the end of the range before it, 4"


async def test_what_an_image_is_made_larger_to_is_held_too(start_actor: StartActor) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "PNG")
    item = MediaItem(content_hash(buffer.getvalue()), buffer.getvalue())
    actor = await start_actor(limits={"max_held_media_bytes": 5 * 2**20})
    larger = dataclasses.replace(item, min_pixels=2**20, max_pixels=2**20)
    await _ask(actor.address, _request(item, larger))
    with pytest.raises(TooLarge, match=r"media: 838\d{4} bytes with what they decode to; the limit is 5242880"):
        await _ask(actor.address, _request(larger, larger))


async def test_media_of_requests_under_way_have_a_bound(start_actor: StartActor) -> None:
    """Small files can be large images: what there is no room for is not decoded, and its client may come again."""
    buffer = io.BytesIO()
    Image.new("1", (1024, 1024)).save(buffer, "PNG")  # 4 MiB once it is decoded
    item = MediaItem(content_hash(buffer.getvalue()), buffer.getvalue())
    actor = await start_actor(fake={"first_token_s": 60.0}, limits={"max_held_media_bytes": 9 * 2**20})
    client = GrpcClient(actor.address)
    under_way = [asyncio.create_task(client.generate(_request(item), timeout_s=60)) for _ in range(2)]
    await until(lambda: actor.engine.load().num_running == 2)
    with pytest.raises(QueueFull, match=r"media of 8389\d{3} bytes are held for the requests under way") as full:
        await _ask(actor.address, _request(item))
    assert full.value.retry_after_s == 0.5
    under_way[0].cancel()
    await until(lambda: actor.engine.load().num_running == 1)
    under_way[0] = asyncio.create_task(client.generate(_request(item), timeout_s=60))
    await until(lambda: actor.engine.load().num_running == 2)
    with pytest.raises(TooLarge, match=r"media: 1258\d{4} bytes with what they decode to; the limit is 9437184"):
        await _ask(actor.address, _request(item, item, item))
    for task in under_way:
        task.cancel()
    await client.close()


async def test_what_is_decoded_for_nobody_is_held_too(start_actor: StartActor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends and cancels has no more than others."""
    decode, is_decoding, goes_on = media_intake._decode, threading.Event(), threading.Event()

    def decode_slowly(*arguments: Any) -> Any:
        is_decoding.set()
        assert goes_on.wait(30)
        return decode(*arguments)

    monkeypatch.setattr(media_intake, "_decode", decode_slowly)
    buffer = io.BytesIO()
    Image.new("1", (1024, 1024)).save(buffer, "PNG")  # 4 MiB once it is decoded
    item = MediaItem(content_hash(buffer.getvalue()), buffer.getvalue())
    actor = await start_actor(fake=FAST, limits={"max_held_media_bytes": 6 * 2**20})
    cancelled = asyncio.create_task(_ask(actor.address, _request(item)))
    await until(is_decoding.is_set)
    cancelled.cancel()
    await until(actor.server._rollouts.idle.is_set)
    with pytest.raises(QueueFull, match="bytes are held for the requests under way"):
        await _ask(actor.address, _request(item))
    goes_on.set()
    await until(lambda: not actor.server._rollouts._intake._held_bytes)
    assert await _ask(actor.address, _request(item))
