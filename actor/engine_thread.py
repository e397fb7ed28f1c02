"""An engine on an event loop and a thread of its own, so that what it computes does not hold up the calls of others.

    gRPC's loop --- a coroutine of the engine --> the engine's loop
                <-- its result, its events ------

vLLM's front end takes tens of milliseconds without a pause when a step of many sequences is done. Here it only holds
the interpreter meanwhile, which it has to hand over twice in a millisecond.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar, cast

import uvloop

from actor.engine import Engine, EngineInfo, EngineLoad, EngineRequest
from common.errors import EngineDead
from common.log import get_logger
from common.types import Completion, EpochSpec, Manifest, PromptInfo

log = get_logger(__name__)

# How long what is aborted may take to end, and the engine to stop. Past that it is left behind.
_ABORT_S = 10.0
_STOP_S = 60.0
# How long one thread may keep the interpreter from another. gRPC's loop waits for it several times in one turn.
_SWITCH_S = 0.0005

T = TypeVar("T")
_Event = PromptInfo | list[Completion]


class EngineThread:
    """Another `Engine` behind the same protocol. Its coroutines may be called from any loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event
        self._turns = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _run(self) -> None:
        async def turn() -> None:
            self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
            self._turns.set()
            await self._stopping.wait()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(turn())

    async def start(self) -> EngineInfo:
        """See `Engine.start`."""
        sys.setswitchinterval(_SWITCH_S)
        self._thread.start()
        await asyncio.to_thread(self._turns.wait)
        return await self._there(self._engine.start())

    async def generate(self, request: EngineRequest) -> AsyncIterator[_Event]:
        """See `Engine.generate`."""
        here = asyncio.get_running_loop()
        events: asyncio.Queue[_Event | None] = asyncio.Queue()  # of one group: as many as it has completions, and two
        ended: asyncio.Future[BaseException | None] = here.create_future()
        tasks: list[asyncio.Task[None]] = []

        async def pass_on() -> None:
            async with aclosing(cast("AsyncGenerator[_Event]", self._engine.generate(request))) as generated:
                async for event in generated:
                    here.call_soon_threadsafe(events.put_nowait, event)

        def begin() -> None:
            tasks.append(self._loop.create_task(pass_on()))
            tasks[0].add_done_callback(lambda task: here.call_soon_threadsafe(end, task))

        def abort() -> None:
            tasks[0].cancel()

        def end(task: asyncio.Task[None]) -> None:
            ended.set_result(EngineDead("the engine has stopped") if task.cancelled() else task.exception())
            events.put_nowait(None)

        self._require_thread()
        self._loop.call_soon_threadsafe(begin)
        try:
            while (event := await events.get()) is not None:
                yield event
            if (error := ended.result()) is not None:
                raise error
        finally:
            if not ended.done():
                self._loop.call_soon_threadsafe(abort)
                await asyncio.wait({ended}, timeout=_ABORT_S)

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
        if not self._turns.is_set() or not self._thread.is_alive():
            return
        try:
            async with asyncio.timeout(_STOP_S):
                await self._there(self._engine.stop())
        except TimeoutError:
            log.error("the engine does not stop", after_s=_STOP_S)
        self._loop.call_soon_threadsafe(self._stopping.set)
        await asyncio.to_thread(self._thread.join, _ABORT_S)

    async def _there(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it on the engine's loop."""
        try:
            self._require_thread()
        except EngineDead:
            coroutine.close()
            raise
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _require_thread(self) -> None:
        if not self._thread.is_alive():
            raise EngineDead("the engine's thread has ended")
