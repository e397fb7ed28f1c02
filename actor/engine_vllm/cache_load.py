"""How full vLLM's cache of keys and values is, and what had to leave it: only the engine process knows.

vLLM tells with each step, if asked to, which costs its front end. Here it is asked now and then; one that hangs does
not answer, which vLLM's own check of its health does not notice.
"""

import asyncio
import functools
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError

from common.log import get_logger

log = get_logger(__name__)

_PERIOD_S = 5.0


class CacheLoad:
    """What an engine process with `tell_cache_load` said last; until `stop`, or the end of the engine."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.usage = 0.0
        self.num_preemptions = 0
        self.unanswered_s = 0.0
        """How long it has not answered, in whole periods: none passes while this process is stopped itself."""
        self._asking = asyncio.create_task(self._ask(engine))

    def stop(self) -> None:
        """Ask no more."""
        self._asking.cancel()

    async def _ask(self, engine: AsyncLLM) -> None:
        try:
            while True:
                self.usage, self.num_preemptions = await self._answer(engine)
                await asyncio.sleep(_PERIOD_S)
        except EngineDeadError:
            pass  # others notice
        except Exception as error:  # noqa: BLE001 - vLLM's for what fails there is as plain
            log.warning("the engine does not tell of its cache any more", error=str(error))

    async def _answer(self, engine: AsyncLLM) -> tuple[float, int]:
        answer: asyncio.Future[tuple[float, int]] = asyncio.ensure_future(
            engine.engine_core.call_utility_async("cache_load")
        )
        try:
            while not (await asyncio.wait([answer], timeout=_PERIOD_S))[0]:
                self.unanswered_s += _PERIOD_S
            self.unanswered_s = 0.0
            return answer.result()
        finally:
            answer.cancel()


@functools.cache
def tell_cache_load() -> None:
    """Let the engine process count what it preempts, and answer."""
    preempt = Scheduler._preempt_request  # noqa: SLF001 - it counts them for its own statistics alone

    @functools.wraps(preempt)
    def count(self: Any, request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        preempt(self, request, timestamp, drop_stale_output)
        if not drop_stale_output:  # else a weight update makes room
            self.num_preemptions = getattr(self, "num_preemptions", 0) + 1

    def cache_load(self: Any) -> tuple[float, int]:
        return self.scheduler.get_kv_cache_usage(), getattr(self.scheduler, "num_preemptions", 0)

    Scheduler._preempt_request = count  # noqa: SLF001
    EngineCore.cache_load = cache_load
