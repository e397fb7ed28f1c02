"""Several actors as one: real servers with the fake engine, some of them slow, full or gone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from common.client import GrpcClient, SampledGroup
from common.errors import DeadlineExceeded, InvalidRequest, OutriderError, QueueFull, Unreachable
from common.pool import RolloutPool, _first_answer
from common.types import PromptInfo, RolloutRequest, SamplingParams, TextPrompt
from tests.helpers.fake_actors import FakeActor, StartActor
from tests.helpers.fakes import until

NOBODY = "127.0.0.1:1"
FAST = {"fake": {"token_s": 0.0}}
SLOW = {"fake": {"first_token_s": 60.0}}

MakePool = Callable[..., RolloutPool]


def request(name: str = "g", **sampling: Any) -> RolloutRequest:
    return RolloutRequest(name, TextPrompt("hello"), (), SamplingParams(**({"n": 3, "max_tokens": 4} | sampling)))


def num_groups(actor: FakeActor, outcome: str) -> float:
    return float(actor.server.metrics.groups.labels(outcome)._value.get())


@pytest.fixture
async def pool_of() -> AsyncIterator[MakePool]:
    clients: list[GrpcClient] = []

    def make(*addresses: str, **options: Any) -> RolloutPool:
        mine = [GrpcClient(address) for address in addresses]
        clients.extend(mine)
        return RolloutPool(mine, **options)

    yield make
    for client in clients:
        await client.close()


async def test_groups_are_spread(start_actor: StartActor, pool_of: MakePool) -> None:
    actors = [await start_actor(fake={"first_token_s": 0.2}) for _ in range(2)]
    pool = pool_of(*(actor.address for actor in actors))
    groups = await asyncio.gather(*(pool.generate(request(f"g{i}"), timeout_s=10) for i in range(8)))
    assert sorted(group.prompt.group_id for group in groups) == [f"g{i}" for i in range(8)]
    assert [num_groups(actor, "finished") for actor in actors] == [4, 4]


async def test_another_actor_is_asked(start_actor: StartActor, pool_of: MakePool) -> None:
    """One is not there, one drains: the third answers."""
    draining, good = await start_actor(**FAST), await start_actor(**FAST)
    draining.server.policy.drain()
    pool = pool_of(NOBODY, draining.address, good.address)
    assert len((await pool.generate(request(), timeout_s=10)).completions) == 3
    assert (num_groups(draining, "refused"), num_groups(good, "finished")) == (1, 1)


async def test_a_bad_request_is_not_tried_elsewhere(start_actor: StartActor, pool_of: MakePool) -> None:
    actors = [await start_actor(**FAST) for _ in range(2)]
    with pytest.raises(InvalidRequest, match=r"sampling\.n"):
        await pool_of(*(actor.address for actor in actors), hedge_after_s=5).generate(request(n=10**6), timeout_s=10)
    assert [num_groups(actor, "refused") for actor in actors] == [1, 0]


async def test_it_gives_up(pool_of: MakePool) -> None:
    with pytest.raises(Unreachable):
        await pool_of(NOBODY, max_failures=3).generate(request(), timeout_s=30)


async def test_a_full_actor_is_asked_again(start_actor: StartActor, pool_of: MakePool) -> None:
    actor = await start_actor(fake={"first_token_s": 0.6}, limits={"max_queued_completions": 3})
    pool = pool_of(actor.address, max_failures=1)
    groups = await asyncio.gather(*(pool.generate(request(f"g{i}"), timeout_s=20) for i in range(2)))
    assert [len(group.completions) for group in groups] == [3, 3]
    assert num_groups(actor, "refused") >= 1


async def test_a_full_actor_keeps_none_from_another_that_has_recovered() -> None:
    """Each is asked again after its own time."""

    class Client:
        def __init__(self, *errors: OutriderError) -> None:
            self.errors = iter(errors)

        async def generate(self, *_: Any, **__: Any) -> Any:
            if (error := next(self.errors, None)) is not None:
                raise error
            return "a group"

    full, recovers = Client(*[QueueFull("full", retry_after_s=60.0)] * 9), Client(Unreachable("gone"))
    assert await RolloutPool([full, recovers]).generate(request(), timeout_s=10) == "a group"  # type: ignore[list-item, comparison-overlap]
    full = Client(*[QueueFull("3 wait", retry_after_s=60.0)] * 9)
    with pytest.raises(DeadlineExceeded, match=r"no actor answered within 0\.5 s; the last one that failed: 3 wait"):
        await RolloutPool([full]).generate(request(), timeout_s=0.5)  # type: ignore[list-item]


async def test_one_deadline_for_all_tries(start_actor: StartActor, pool_of: MakePool) -> None:
    slow = await start_actor(**SLOW)
    with pytest.raises(DeadlineExceeded):
        await pool_of(NOBODY, slow.address, hedge_after_s=0.05).generate(request(), timeout_s=1.0)
    await until(lambda: slow.engine.load().num_running == 0)


async def test_no_hedging_unless_asked_for(start_actor: StartActor, pool_of: MakePool) -> None:
    slow, fast = await start_actor(**SLOW), await start_actor(**FAST)
    with pytest.raises(DeadlineExceeded):
        await pool_of(slow.address, fast.address).generate(request(), timeout_s=1.0)
    assert num_groups(fast, "finished") == 0


async def test_the_first_answer_wins(start_actor: StartActor, pool_of: MakePool) -> None:
    """The slow actor's call is cancelled and its engine freed; the group is the other one's alone."""
    slow, fast = await start_actor(**SLOW), await start_actor(**FAST)
    pool = pool_of(slow.address, fast.address, hedge_after_s=0.1)
    group = await pool.generate(request(), timeout_s=30)
    assert len({completion.trajectory_id for completion in group.completions}) == 3
    await until(lambda: slow.engine.load().num_running == 0)
    await until(lambda: num_groups(slow, "cancelled") == 1)
    assert num_groups(fast, "finished") == 1


async def test_the_first_actor_may_still_win(start_actor: StartActor, pool_of: MakePool) -> None:
    """Asked second, the other one fails: that is no reason to give up the first."""
    first = await start_actor(fake={"first_token_s": 1.0})
    full = await start_actor(fake={"first_token_s": 60.0}, standalone=False)
    group = await pool_of(first.address, full.address, hedge_after_s=0.1, max_failures=1).generate(
        request(), timeout_s=30
    )
    assert len(group.completions) == 3
    assert num_groups(full, "refused") == 1


async def test_an_answer_wins_over_an_error_of_the_same_moment() -> None:
    """Whatever the order in which a set of tasks gives them."""

    async def answer() -> SampledGroup:
        return SampledGroup(PromptInfo("g", "a", np.array([], np.int32), np.array([], np.int32)), ())

    async def refused() -> SampledGroup:
        raise InvalidRequest("text", "is empty")

    for _ in range(50):
        tries = [asyncio.create_task(refused()), asyncio.create_task(answer())]
        await asyncio.wait(tries)
        assert (await _first_answer(tries)).prompt.group_id == "g"
