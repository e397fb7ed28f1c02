"""Futures that are done."""

from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def done(value: T) -> Future[T]:
    """With this result."""
    future: Future[T] = Future()
    future.set_result(value)
    return future
