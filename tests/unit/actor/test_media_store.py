import pytest

from actor.media_store import MediaStore
from common.errors import TooLarge

A, B, C, D = (bytes([i]) * 32 for i in range(4))


def test_the_least_recently_used_goes_first() -> None:
    store = MediaStore(max_bytes=10)
    store.put(A, b"aaaa")
    store.put(B, b"bbbb")
    assert store.get(A) == b"aaaa"  # A is now younger than B
    store.put(C, b"cccc")
    assert (A in store, B in store, C in store) == (True, False, True)
    assert (store.num_bytes, len(store)) == (8, 2)
    store.put(D, b"d" * 10)
    assert (len(store), store.num_bytes) == (1, 10)
    assert store.get(A) is None


def test_putting_twice_counts_once() -> None:
    store = MediaStore(max_bytes=10)
    store.put(A, b"aaaa")
    store.put(B, b"bb")
    store.put(A, b"aaaa")
    assert store.num_bytes == 6
    store.put(C, b"cccccc")
    assert B not in store
    assert A in store


def test_an_item_larger_than_the_store_is_refused() -> None:
    store = MediaStore(max_bytes=3)
    store.put(A, b"aaa")
    with pytest.raises(TooLarge):
        store.put(B, b"bbbb")
    assert store.get(A) == b"aaa"
