"""A pause of generation that an operator asks for, and that ends by itself if it is forgotten."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from actor.engine import Engine
from common.log import get_logger

log = get_logger(__name__)


class Pause:
    """Belongs to one event loop. `changed` is called when `active` has changed.

    What has begun goes on when its caller leaves: half a pause has no limit.
    """

    def __init__(self, engine: Engine, changed: Callable[[], None]) -> None:
        self.active = False
        self._stays = False
        self._engine = engine
        self._changed = changed
        self._lock = asyncio.Lock()
        self._limit: asyncio.TimerHandle | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    async def begin(self, timeout_s: float) -> None:
        """Stand still for `timeout_s` at most, counted anew. Raises EngineDead."""
        await asyncio.shield(self._task(self._begin(timeout_s)))

    async def end(self) -> None:
        """Go on; nothing happens without a pause. Raises EngineDead."""
        await asyncio.shield(self._task(self._end()))

    def stay(self) -> None:
        """No pause ends by itself any more."""
        self._stays = True
        self._forget_limit()

    async def _begin(self, timeout_s: float) -> None:
        async with self._lock:
            self._forget_limit()
            await self._engine.pause()
            if not self._stays:
                self._limit = asyncio.get_running_loop().call_later(timeout_s, self._time_is_up)
            self._set(active=True)

    async def _end(self) -> None:
        async with self._lock:
            self._forget_limit()
            if self.active:
                await self._engine.resume()
                self._set(active=False)

    def _task(self, step: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(step)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def _time_is_up(self) -> None:
        log.warning("nobody has resumed generation in time: the pause ends")
        self._task(self._end())

    def _forget_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _set(self, *, active: bool) -> None:
        if active is not self.active:
            log.info("paused" if active else "resumed")
            self.active = active
            self._changed()
