"""Items that come in chunks, one checked while the next comes."""

import asyncio
import hashlib
import io
import tracemalloc
from collections.abc import AsyncIterator, Sequence

import pytest
from PIL import Image

from actor.config import ActorConfig
from actor.media import uploads as uploads_module
from actor.media.store import ITEM_BYTES, MediaStore
from actor.media.uploads import Uploads
from common.errors import DeadlineExceeded, InvalidRequest, QueueFull, TooLarge
from common.pb.rollout.v1 import rollout_pb2 as pb

_IMAGES = []
for shade in range(3):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    _IMAGES.append(file.getvalue())
_HASHES = [hashlib.sha256(image).digest() for image in _IMAGES]


async def _stream(items: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[pb.PutMediaRequest]:
    """Each item in two chunks."""
    for sha256, data in items:
        half = len(data) // 2
        yield pb.PutMediaRequest(sha256=sha256, num_bytes=len(data), chunk=data[:half])
        yield pb.PutMediaRequest(chunk=data[half:])


async def _broken_off(items: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[pb.PutMediaRequest]:
    async for request in _stream(items):
        yield request
    raise ConnectionError("the caller is gone")


@pytest.fixture
def store() -> MediaStore:
    return MediaStore(4 * (max(map(len, _IMAGES)) + ITEM_BYTES))


@pytest.fixture
def uploads(store: MediaStore) -> Uploads:
    return Uploads(store, ActorConfig(engine="fake").server_limits(4096))


async def test_all_are_stored_in_their_order(uploads: Uploads, store: MediaStore) -> None:
    assert await uploads.receive(_stream(list(zip(_HASHES, _IMAGES, strict=True)))) == _HASHES
    assert [store.get(sha256) for sha256 in _HASHES] == _IMAGES


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_one_that_is_not_its_hash_ends_the_call(uploads: Uploads, store: MediaStore, place: int) -> None:
    items = list(zip(_HASHES, _IMAGES, strict=True))
    items[place] = (bytes(32), _IMAGES[place])
    with pytest.raises(InvalidRequest, match="sha256") as caught:
        await uploads.receive(_stream(items))
    assert caught.value.field == "sha256"
    assert bytes(32) not in store


async def test_a_call_that_ends_early_gives_its_room_back(uploads: Uploads, store: MediaStore) -> None:
    big = bytes(store.max_item_bytes)

    async def unfinished() -> AsyncIterator[pb.PutMediaRequest]:
        yield pb.PutMediaRequest(sha256=_HASHES[0], num_bytes=len(big), chunk=big[:-10])
        with pytest.raises(QueueFull, match=f"2 uploads of {len(big) - 10} bytes are under way"):
            await uploads.receive(_stream([(_HASHES[1], big)]))
        raise ConnectionError("the caller is gone")

    with pytest.raises(ConnectionError):
        await uploads.receive(unfinished())
    with pytest.raises(ConnectionError):  # while its last item is looked at
        await uploads.receive(_broken_off([(_HASHES[0], _IMAGES[0])]))
    assert await uploads.receive(_stream([(_HASHES[2], _IMAGES[2])])) == [_HASHES[2]]


async def test_an_item_whose_check_never_began_gives_its_room_back(uploads: Uploads) -> None:
    """What comes with the next item ends the call in the step in which the check would have begun."""

    async def refused() -> AsyncIterator[pb.PutMediaRequest]:
        yield pb.PutMediaRequest(sha256=_HASHES[0], num_bytes=len(_IMAGES[0]), chunk=_IMAGES[0])
        yield pb.PutMediaRequest(sha256=_HASHES[1], num_bytes=0, chunk=b"x")

    with pytest.raises(InvalidRequest, match="more bytes than the 0 of num_bytes"):
        await uploads.receive(refused())
    assert not uploads._under_way


async def test_too_many_frames_are_refused_before_anything_is_made_of_them(uploads: Uploads) -> None:
    request = pb.PutMediaRequest(sha256=_HASHES[0], frame_num_bytes=[0] * 2**20)

    async def announced() -> AsyncIterator[pb.PutMediaRequest]:
        yield request

    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="1048576 frames"):
            await uploads.receive(announced())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


async def test_who_announces_much_and_sends_nothing_keeps_nobody_out(
    uploads: Uploads, store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "_CHUNK_S", 2.0)

    async def stalled(sha256: bytes) -> AsyncIterator[pb.PutMediaRequest]:
        yield pb.PutMediaRequest(sha256=sha256, num_bytes=store.max_item_bytes, chunk=b"x")
        await asyncio.Event().wait()

    calls = [asyncio.create_task(uploads.receive(stalled(sha256))) for sha256 in _HASHES]
    await asyncio.sleep(0)
    assert await uploads.receive(_stream([(_HASHES[0], _IMAGES[0])])) == [_HASHES[0]]
    assert not any(call.done() for call in calls)
    for call in calls:
        with pytest.raises(DeadlineExceeded, match=r"no chunk has come for 2 s"):
            await call
    assert not uploads._under_way


@pytest.mark.parametrize("sends_items", [False, True])
async def test_who_sends_next_to_nothing_again_and_again_is_let_go(
    uploads: Uploads, sends_items: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty chunks of one item, or a small item ever again: each in time, and all too slow."""
    monkeypatch.setattr(uploads_module, "_CHUNK_S", 0.5)
    num_sent = 0

    async def trickle() -> AsyncIterator[pb.PutMediaRequest]:
        nonlocal num_sent
        yield pb.PutMediaRequest(sha256=_HASHES[0], num_bytes=len(_IMAGES[0]), chunk=_IMAGES[0] if sends_items else b"")
        while num_sent < 40:
            await asyncio.sleep(0.1)
            num_sent += 1
            if sends_items:
                yield pb.PutMediaRequest(sha256=_HASHES[0], num_bytes=len(_IMAGES[0]), chunk=_IMAGES[0])
            else:
                yield pb.PutMediaRequest()

    with pytest.raises(DeadlineExceeded, match=r"no chunk has come for 0.5 s, or fewer than 65536 bytes/s of them"):
        await uploads.receive(trickle())
    assert num_sent < 10
    assert not uploads._under_way


async def test_who_sends_enough_may_take_longer(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "_CHUNK_S", 0.5)
    monkeypatch.setattr(uploads_module, "_MIN_BYTES_PER_S", len(_IMAGES[0]))

    async def steady() -> AsyncIterator[pb.PutMediaRequest]:
        for _ in range(10):
            await asyncio.sleep(0.1)
            yield pb.PutMediaRequest(sha256=_HASHES[0], num_bytes=len(_IMAGES[0]), chunk=_IMAGES[0])

    assert await uploads.receive(steady()) == [_HASHES[0]]
