"""The cache of decoded media: each file once, whoever asks, and no more bytes than its bound."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actor.media import decoded as decoded_media
from actor.media.decoded import DecodedMedia
from actor.media.store import ITEM_BYTES
from common.errors import InvalidRequest


def counted(calls: list[str], name: str, size: int = 1) -> Callable[[], Image.Image]:
    """A decoder of images of 4 * size bytes that says when it ran."""

    def decode() -> Image.Image:
        calls.append(name)
        return Image.new("RGB", (size, 1))

    return decode


def test_threads_that_ask_at_once_share_one_decoding() -> None:
    cache = DecodedMedia(1000 + ITEM_BYTES)
    calls: list[str] = []
    waiting, go = threading.Barrier(8), threading.Event()

    def slow() -> Image.Image:
        calls.append("a")
        assert go.wait(10)
        return Image.new("RGB", (1, 1))

    def ask() -> Image.Image:
        waiting.wait(10)
        return cache.get(b"a", slow)

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        go.set()
        images = {id(future.result(timeout=10)) for future in asked}
    assert calls == ["a"]
    assert len(images) == 1


def test_the_least_recently_used_go_first() -> None:
    cache = DecodedMedia(26 + 2 * ITEM_BYTES)
    calls: list[str] = []
    for name in ("a", "b", "a", "c", "a", "b"):  # 12 bytes each: two of them fit
        cache.get(name.encode(), counted(calls, name, 3))
    assert calls == ["a", "b", "c", "b"]
    video = np.zeros((2, 1, 2, 3), np.uint8)
    assert cache.get(b"v", lambda: video) is video  # 12 bytes too
    cache.get(b"b", counted(calls, "b", 3))
    cache.get(b"a", counted(calls, "a", 3))
    assert calls == ["a", "b", "c", "b", "a"]


def test_many_small_images_are_not_for_nothing() -> None:
    """PIL's object around one pixel takes 2.4 KB."""
    cache = DecodedMedia(10_000)
    calls: list[str] = []
    for name in ("a", "b", "c", "c", "b", "a"):
        cache.get(name.encode(), counted(calls, name))
    assert calls == ["a", "b", "c", "a"]


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = DecodedMedia(3 + ITEM_BYTES)
    calls: list[str] = []
    for _ in range(2):
        cache.get(b"a", counted(calls, "a"))
    assert calls == ["a", "a"]


def test_an_error_is_kept_for_nobody() -> None:
    cache = DecodedMedia(1000 + ITEM_BYTES)
    calls: list[str] = []

    def damaged(field: str) -> Callable[[], Image.Image]:
        def decode() -> Image.Image:
            calls.append(field)
            raise InvalidRequest(field, "damaged")

        return decode

    for field in ("media[0]", "media[1]"):
        with pytest.raises(InvalidRequest) as refused:
            cache.get(b"a", damaged(field))
        assert refused.value.field == field
    for _ in range(2):
        cache.get(b"a", counted(calls, "whole"))
    assert calls == ["media[0]", "media[1]", "whole"]


def test_who_waits_for_a_decoding_that_fails_decodes_on_its_own() -> None:
    cache = DecodedMedia(1000 + ITEM_BYTES)
    calls: list[str] = []
    other = threading.Thread(target=lambda: cache.get(b"a", counted(calls, "other")), daemon=True)

    def damaged() -> Image.Image:
        other.start()
        other.join(0.2)  # for ever, if it could
        assert not calls
        raise InvalidRequest("media[0]", "damaged")

    with pytest.raises(InvalidRequest):
        cache.get(b"a", damaged)
    other.join(10)
    assert calls == ["other"]


def test_what_lost_its_place_while_it_was_decoded_takes_no_room() -> None:
    cache = DecodedMedia(40 + 2 * ITEM_BYTES)
    calls: list[str] = []

    def slow() -> Image.Image:
        for name in ("b", "c"):
            cache.get(name.encode(), counted(calls, name, 6))
        return Image.new("RGB", (6, 1))

    cache.get(b"a", slow)
    cache.get(b"c", counted(calls, "c", 6))
    assert calls == ["b", "c"]


def test_what_another_thread_evicts_has_been_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills the cache just as the first image is done. Bytes that go must have come, or the bound moves."""
    cache = DecodedMedia(40 + 2 * ITEM_BYTES)
    calls: list[str] = []

    def fill() -> None:
        for name in ("b", "c"):
            cache.get(name.encode(), counted(calls, name, 6))

    filling = threading.Thread(target=fill)

    class Interrupted(Future[Any]):
        def set_result(self, result: Any) -> None:
            super().set_result(result)
            if result.width == 4:
                filling.start()
                filling.join(0.2)  # for ever, while this thread has the lock

    monkeypatch.setattr(decoded_media, "Future", Interrupted)
    cache.get(b"a", counted(calls, "a", 4))
    filling.join(10)
    assert calls == ["a", "b", "c"]
    cache.get(b"b", counted(calls, "b", 6))  # 24 bytes as c: there is no room for both
    assert calls == ["a", "b", "c", "b"]


def test_a_failure_takes_no_other_thread_s_image_along() -> None:
    """The slow decoding fails after its place went to others, and one of them decoded the same file."""
    cache = DecodedMedia(40 + 2 * ITEM_BYTES)
    calls: list[str] = []

    def slow() -> Image.Image:
        for name in ("b", "c", "a"):
            cache.get(name.encode(), counted(calls, name, 6))
        raise InvalidRequest("media[0]", "damaged")

    with pytest.raises(InvalidRequest):
        cache.get(b"a", slow)
    cache.get(b"a", counted(calls, "a", 6))
    assert calls == ["b", "c", "a"]
