import pytest

from actor.media.store import ITEM_BYTES, MediaStore
from common.errors import TooLarge

A, B, C, D = (bytes([i]) * 32 for i in range(4))


def test_the_least_recently_used_goes_first() -> None:
    store = MediaStore(max_bytes=10 + 2 * ITEM_BYTES)
    store.put(A, b"aaaa")
    store.put(B, b"bbbb")
    assert store.get(A) == b"aaaa"  # A is now younger than B
    store.put(C, b"cccc")
    assert (A in store, B in store, C in store) == (True, False, True)
    assert (store.num_bytes, len(store)) == (8 + 2 * ITEM_BYTES, 2)
    store.put(D, b"d" * 10)
    assert (len(store), store.num_bytes) == (1, 10 + ITEM_BYTES)
    assert store.get(A) is None


def test_putting_twice_counts_once() -> None:
    store = MediaStore(max_bytes=10 + 3 * ITEM_BYTES)
    store.put(A, b"aaaa")
    store.put(B, b"bb")
    store.put(A, b"aaaa")
    assert store.num_bytes == 6 + 2 * ITEM_BYTES
    store.put(C, b"cccccc")
    assert B not in store
    assert A in store


def test_an_item_larger_than_the_store_is_refused() -> None:
    store = MediaStore(max_bytes=3 + ITEM_BYTES)
    assert store.max_item_bytes == 3
    store.put(A, b"aaa")
    with pytest.raises(TooLarge, match="an item of 4 bytes; the media store takes 3"):
        store.put(B, b"bbbb")
    assert store.get(A) == b"aaa"


def test_many_small_items_are_not_for_nothing() -> None:
    """Each is an object or two, an entry and a key."""
    store = MediaStore(max_bytes=10_000)
    for i in range(20):
        store.put(bytes([i]) * 32, b"x")
    assert len(store) == 2
