"""An event loop whose time is a number: it jumps to the next timer as soon as nothing else is left to do.

What would hang on a real loop is an error here: nobody left who could wake anybody, or a time limit that passes.
"""

import asyncio
import collections
import contextvars
import heapq
import itertools
from asyncio import events
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

# Callbacks within one instant of virtual time; more is a loop that turns without waiting for anything.
_MAX_TURNS = 20_000


class Stuck(AssertionError):  # noqa: N818 - says what is wrong
    """The program waits for something that will never come, or not in time."""


class Handle:
    """A callback to come. Contexts are left out: nothing here has context variables."""

    __slots__ = ("args", "callback", "is_cancelled")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.callback = callback
        self.args = args
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled


class _Future(asyncio.Future[T]):
    """Hashed by its number: sets of them would be in the order of their addresses, which no seed decides."""

    def __init__(self, number: int, loop: "VirtualLoop") -> None:
        super().__init__(loop=loop)
        self._number = number

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[T]):
    """As `_Future`."""

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as the learner's and the actor's state machines use.

    Functions for other threads run at once; their results come back `thread_s()` later.
    """

    def __init__(self, thread_s: Callable[[], float] = lambda: 0.0) -> None:
        self.now = 0.0
        self.errors: list[dict[str, Any]] = []
        """What would have been logged as an error of the loop: exceptions that nobody looked at."""
        self._thread_s = thread_s
        self._ready: collections.deque[Handle] = collections.deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._num_timers = 0
        self._numbers = itertools.count()

    def run(self, main: Coroutine[Any, Any, T], *, until: float) -> T:
        """Run to the end of `main`. Raises `Stuck` if that would never come, or not before `until`."""
        task = self.create_task(main)
        events._set_running_loop(self)
        turns = 0
        ready = self._ready
        try:
            while not task.done():
                if not ready:
                    self._jump(until)
                    turns = 0
                handle = ready.popleft()
                if handle.is_cancelled:
                    continue
                try:
                    handle.callback(*handle.args)
                except Exception as error:  # noqa: BLE001 - as every event loop: it goes on, and says so
                    self.call_exception_handler({"message": "Exception in callback", "exception": error})
                turns += 1
                if turns > _MAX_TURNS:
                    raise Stuck(f"at {self.now:.3f} s the loop turns without end: {handle.callback}")
        finally:
            events._set_running_loop(None)
        return task.result()

    def _jump(self, until: float) -> None:
        """To the next timer."""
        while self._timers:
            when, _, handle = heapq.heappop(self._timers)
            if handle.is_cancelled:
                continue
            if when > until:
                raise Stuck(f"not done after {until:.0f} s of virtual time")
            self.now = max(self.now, when)
            self._ready.append(handle)
            return
        raise Stuck(f"at {self.now:.3f} s nobody is left who could wake anybody")

    # ------------------------------------------------------------------------------------ what asyncio asks of a loop

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_at(self.now + delay, callback, *args)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, handle))
        return handle

    def create_future(self) -> "asyncio.Future[Any]":
        return _Future(next(self._numbers), self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> "asyncio.Task[T]":
        return _Task(next(self._numbers), coro, loop=self, name=name or "task", context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - the future carries it
            self.call_later(self._thread_s(), _fail, future, error)
        else:
            self.call_later(self._thread_s(), _finish, future, result)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)


def _finish(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
