"""`PutMedia` takes streams of chunks, whole and damaged, as a model in ten lines says that it must."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from actor.media.store import MediaStore
from actor.media.uploads import Uploads
from common.errors import InvalidRequest, TooLarge
from common.media import media_hash
from common.pb.rollout.v1 import rollout_pb2 as pb
from common.types import Frames, ServerLimits
from tests.helpers.fake_actors import png

put = pb.PutMediaRequest
CONTENTS = (png(0), png(1, image_format="JPEG"), Frames((png(2), png(3))))
# By name: the bytes that cross, and the sizes of frames.
GOOD = {
    media_hash(content): (b"".join(files), [len(file) for file in files if isinstance(content, Frames)])
    for content, files in ((each, each.files if isinstance(each, Frames) else (each,)) for each in CONTENTS)
}
LIMITS = ServerLimits(max_media_bytes=2**16, max_media_pixels=2**12, max_video_frames=4)


def expected(messages: Sequence[pb.PutMediaRequest]) -> list[bytes] | None:
    """What the answer names, each item once; None for what must be refused."""
    items: list[tuple[pb.PutMediaRequest, bytearray]] = []
    for message in messages:
        if message.sha256:
            items.append((message, bytearray()))
        if not items:
            return None
        items[-1][1].extend(message.chunk)
    for first, data in items:
        if first.num_bytes != len(data) or GOOD.get(first.sha256) != (bytes(data), list(first.frame_num_bytes)):
            return None
    return list(dict.fromkeys(first.sha256 for first, _ in items))


@st.composite
def streams(draw: st.DrawFn) -> list[pb.PutMediaRequest]:
    """Some items, cut anywhere."""
    messages = []
    for sha256 in draw(st.lists(st.sampled_from(sorted(GOOD)), max_size=4)):
        data, sizes = GOOD[sha256]
        cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
        first, *others = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
        messages.append(put(sha256=sha256, num_bytes=len(data), frame_num_bytes=sizes, chunk=first))
        messages += [put(chunk=chunk) for chunk in others]
    return messages


@st.composite
def damaged_streams(draw: st.DrawFn) -> list[pb.PutMediaRequest]:
    """The same with messages lost, doubled, moved or changed."""
    messages = draw(streams().filter(bool))
    for _ in range(draw(st.integers(1, min(2, len(messages))))):
        place = draw(st.integers(0, len(messages) - 1))
        message, changed = messages[place], put()
        more = min(message.num_bytes + 1, 2**64 - 1)
        changed.CopyFrom(message)
        match draw(st.sampled_from(["lost", "doubled", "announced", "longer", "chunk", "name", "frames"])):
            case "lost":
                del messages[place]
                continue
            case "doubled":
                messages.insert(draw(st.integers(0, len(messages))), message)
                continue
            case "announced":
                changed.num_bytes = draw(st.sampled_from([more, 0, 2**16 + 1, 2**64 - 1]))
            case "longer":
                changed.num_bytes = more
                changed.chunk += b"x"
            case "chunk":
                changed.chunk = draw(st.binary(max_size=9) | st.just(message.chunk[1:]))
            case "name":
                changed.sha256 = draw(st.sampled_from([*sorted(GOOD), b"", bytes(31), bytes(32)]))
            case "frames":
                changed.frame_num_bytes[:] = draw(st.lists(st.integers(0, 2**64 - 1), max_size=6))
        messages[place] = changed
    return messages


@settings(max_examples=500)
@given(streams() | damaged_streams())
def test_chunks_are_taken_or_refused(messages: list[pb.PutMediaRequest]) -> None:
    store = MediaStore(2**20)
    uploads = Uploads(store, LIMITS)
    named = expected(messages)
    event("taken" if named is not None else "refused")
    answer: list[bytes] | str | None
    try:
        answer = asyncio.run(uploads.receive(_sent(messages)))
    except (InvalidRequest, TooLarge) as error:
        answer = error.field
    if named is not None:
        assert answer == named
    else:
        assert answer in {"sha256", "num_bytes", "frame_num_bytes", "chunk"}
    assert not uploads._under_way
    for sha256, content in store._items.items():  # also of a call that was refused: what came before
        assert media_hash(content) == sha256


async def _sent(messages: Sequence[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message
