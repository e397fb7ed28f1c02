"""An engine on an event loop and a thread of its own, so that what it computes does not hold up the calls of others.

    gRPC's loop --- a coroutine of the engine --> the engine's loop
                <-- its result, its events ------

vLLM's front end takes tens of milliseconds without a pause when a step of many sequences is done. Here it only holds
the interpreter meanwhile, which it has to hand over every few milliseconds.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

import uvloop

from actor.engine import Engine, EngineInfo, EngineLoad, EngineRequest
from common.types import Completion, EpochSpec, Manifest, PromptInfo

T = TypeVar("T")
_Event = PromptInfo | list[Completion]


class EngineThread:
    """Another `Engine` behind the same protocol. Its coroutines may be called from any loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        self._thread.start()
        return await self._there(self._engine.start())

    async def generate(self, request: EngineRequest) -> AsyncIterator[_Event]:
        """See `Engine.generate`."""
        here = asyncio.get_running_loop()
        events: asyncio.Queue[_Event | None] = asyncio.Queue()  # of one group: as many as it has completions, and two

        async def pass_on() -> None:
            try:
                async with aclosing(cast("AsyncGenerator[_Event]", self._engine.generate(request))) as generated:
                    async for event in generated:
                        here.call_soon_threadsafe(events.put_nowait, event)
            finally:
                here.call_soon_threadsafe(events.put_nowait, None)

        passing = asyncio.run_coroutine_threadsafe(pass_on(), self._loop)
        try:
            while (event := await events.get()) is not None:
                yield event
            await asyncio.wrap_future(passing)  # raises what ended it
        finally:
            passing.cancel()

    async def open_epoch(self, spec: EpochSpec) -> None:
        """See `Engine.open_epoch`."""
        await self._there(self._engine.open_epoch(spec))

    async def stage(self, manifest: Manifest, timeout_s: float) -> tuple[int, ...]:
        """See `Engine.stage`."""
        return await self._there(self._engine.stage(manifest, timeout_s))

    async def commit(self, policy_version: int) -> float:
        """See `Engine.commit`."""
        return await self._there(self._engine.commit(policy_version))

    async def pause(self) -> None:
        """See `Engine.pause`."""
        await self._there(self._engine.pause())

    async def resume(self) -> None:
        """See `Engine.resume`."""
        await self._there(self._engine.resume())

    async def abort_epoch(self) -> None:
        """See `Engine.abort_epoch`."""
        await self._there(self._engine.abort_epoch())

    def adapters(self) -> tuple[str, ...]:
        """See `Engine.adapters`."""
        return self._engine.adapters()

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        return self._engine.load()

    async def check(self) -> None:
        """See `Engine.check`."""
        await self._there(self._engine.check())

    async def stop(self) -> None:
        """See `Engine.stop`."""
        if not self._thread.is_alive():
            return
        await self._there(self._engine.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def _there(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the engine's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))
