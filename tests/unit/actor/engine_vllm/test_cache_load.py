"""What the engine process tells of its cache, without an engine."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError

from actor.config import VllmConfig
from actor.engine_vllm import cache_load
from actor.engine_vllm.cache_load import tell_cache_load
from actor.engine_vllm.engine import VllmEngine
from common.errors import EngineDead
from tests.helpers.fakes import until


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine process, whose scheduler does nothing."""
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *_: None)
    monkeypatch.setattr(Scheduler, "get_kv_cache_usage", lambda _self: 0.75)
    monkeypatch.setattr(EngineCore, "cache_load", None, raising=False)
    tell_cache_load.__wrapped__()
    made = object.__new__(EngineCore)
    made.scheduler = object.__new__(Scheduler)
    return made


def test_what_a_weight_update_takes_back_is_no_preemption(core: Any) -> None:
    assert core.cache_load() == (0.75, 0)
    core.scheduler._preempt_request("request", 0.0)
    core.scheduler._preempt_request("request", 0.0, drop_stale_output=False)
    core.scheduler._preempt_request("request", 0.0, drop_stale_output=True)
    assert core.cache_load() == (0.75, 2)


async def test_it_is_asked_until_the_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_load, "_PERIOD_S", 0.0)
    answers = [[0.5, 0], [0.75, 3]]

    async def call_utility_async(method: str) -> list[float]:
        assert method == "cache_load"
        if not answers:
            raise EngineDeadError
        return answers.pop(0)

    engine: Any = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call_utility_async))
    load = cache_load.CacheLoad(engine)
    await asyncio.wait_for(load._asking, 10)
    assert (load.usage, load.num_preemptions) == (0.75, 3)


async def test_an_engine_that_does_not_answer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And forgiven as soon as it does."""
    monkeypatch.setattr(cache_load, "_PERIOD_S", 0.001)
    answers = [asyncio.Event(), asyncio.Event()]

    async def call_utility_async(_method: str) -> list[float]:
        await answers[0].wait()
        del answers[0]
        return [0.5, 0]

    engine: Any = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call_utility_async))
    load = cache_load.CacheLoad(engine)
    await until(lambda: load.unanswered_s > 0.01, 0.001)
    answers[0].set()
    await until(lambda: load.unanswered_s == 0, 0)
    assert load.usage == 0.5
    await until(lambda: load.unanswered_s > 0.01, 0.001)
    load.stop()
    with pytest.raises(asyncio.CancelledError):
        await load._asking


async def test_an_engine_that_hangs_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "60")

    async def check_health() -> None:
        pass  # vLLM's says nothing of it

    engine = VllmEngine(Path("model"), VllmConfig(), "one")
    engine._engine, engine._cache = SimpleNamespace(check_health=check_health), SimpleNamespace(unanswered_s=60.0)  # type: ignore[assignment]
    await engine.check()
    engine._cache.unanswered_s += 5.0
    with pytest.raises(EngineDead, match="has not answered for 60 s"):
        await engine.check()
