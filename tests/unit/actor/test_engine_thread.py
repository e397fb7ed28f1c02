import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from actor.config import FakeConfig
from actor.engine import EngineRequest
from actor.engine_fake.engine import FakeEngine
from actor.engine_thread import EngineThread
from common.errors import EngineDead, InvalidRequest
from common.types import ChatMessage, ChatPrompt, Completion, PromptInfo, SamplingParams, TextPart
from tests.helpers.fakes import until

CHAT = ChatPrompt((ChatMessage("u", (TextPart("ab"),)),))


class Watched(FakeEngine):
    """Notes which thread runs it."""

    def __init__(self, **config: object) -> None:
        super().__init__(FakeConfig.model_validate(config), "actor")
        self.threads: set[int] = set()

    async def check(self) -> None:
        self.threads.add(threading.get_ident())
        await super().check()


def _request(n: int = 4, max_tokens: int = 20) -> EngineRequest:
    return EngineRequest("g", CHAT, (), SamplingParams(n=n, max_tokens=max_tokens, seed=7, ignore_eos=True))


async def _answers(engine: FakeEngine | EngineThread, request: EngineRequest) -> tuple[PromptInfo, list[Completion]]:
    info, *lists = [event async for event in engine.generate(request)]
    assert isinstance(info, PromptInfo)
    completions = [completion for event in lists if isinstance(event, list) for completion in event]
    return info, sorted(completions, key=lambda completion: completion.index)


@asynccontextmanager
async def running(inner: Watched) -> AsyncIterator[EngineThread]:
    engine = EngineThread(inner)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def test_same_events_from_another_thread() -> None:
    """And the caller's loop turns meanwhile."""
    inner = Watched(token_s=0.001)
    engine = EngineThread(inner)
    assert (await engine.start()).name == "fake"
    try:
        info, completions = await _answers(engine, _request())
        expected_info, expected = await _answers(Watched(token_s=0), _request())
        np.testing.assert_array_equal(info.expanded_ids, expected_info.expanded_ids)
        assert [c.token_ids.tolist() for c in completions] == [c.token_ids.tolist() for c in expected]
        assert threading.get_ident() not in inner.threads
        assert inner.threads
    finally:
        await engine.stop()


async def test_errors_of_the_engine_come_through() -> None:
    async with running(Watched(token_s=0, die_at_group=2, max_context_tokens=8)) as engine:
        with pytest.raises(InvalidRequest) as refused:
            await _answers(
                engine, EngineRequest("g", ChatPrompt((ChatMessage("u", (TextPart("x" * 20),)),)), (), SamplingParams())
            )
        assert refused.value.field == "prompt"
        with pytest.raises(EngineDead):
            await _answers(engine, _request())
        with pytest.raises(EngineDead):
            await engine.check()


async def test_closing_the_iterator_aborts_what_runs() -> None:
    async with running(Watched(token_s=1.0, first_token_s=1.0)) as engine:
        events = engine.generate(_request())
        assert isinstance(await anext(events), PromptInfo)
        await until(lambda: engine.load().num_running == 4, pause_s=0.001)
        await events.aclose()  # type: ignore[attr-defined]
        await until(lambda: engine.load().num_running == 0, pause_s=0.001)


async def test_cancelling_a_caller_aborts_what_runs() -> None:
    async with running(Watched(token_s=1.0, first_token_s=1.0)) as engine:
        caller = asyncio.create_task(_answers(engine, _request()))
        await until(lambda: engine.load().num_running == 4, pause_s=0.001)
        caller.cancel()
        await until(lambda: engine.load().num_running == 0, pause_s=0.001)


async def test_the_callers_loop_turns_while_the_engine_computes() -> None:
    class Busy(Watched):
        async def check(self) -> None:
            """Without a pause, until the caller's loop has turned."""
            started.set()
            while not turned.is_set():
                pass

    started, turned = threading.Event(), threading.Event()
    async with running(Busy(token_s=0)) as engine:
        try:
            checking = asyncio.create_task(engine.check())
            await until(started.is_set)
            await asyncio.sleep(0.001)
            turned.set()
            await checking
        finally:
            turned.set()


async def test_stopping_ends_the_thread() -> None:
    engine = EngineThread(Watched(token_s=0))
    await engine.start()
    [thread] = [thread for thread in threading.enumerate() if thread.name == "engine"]
    await engine.stop()
    assert not thread.is_alive()
    await engine.stop()
