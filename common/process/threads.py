"""Jobs on threads of their own, which nothing waits for: those that may be stuck for as long as somebody else is, and
those that must not queue for the few threads of an event loop.
"""

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def run_in_thread(job: Callable[[], T], name: str) -> "Future[T]":
    """Run `job` on a daemon thread, so that a job that is stuck cannot hold up the end of the process."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # a waiter that gives up cannot cancel what a thread is doing

    def run() -> None:
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001 - the future carries it to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def to_own_thread(name: str, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """As `asyncio.to_thread`, with `run_in_thread`."""
    return await asyncio.wrap_future(run_in_thread(functools.partial(job, *args, **kwargs), name))
