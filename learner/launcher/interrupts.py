"""Signals while a process is started."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a SIGINT or SIGTERM after the block: what it starts is known then, and can end."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
