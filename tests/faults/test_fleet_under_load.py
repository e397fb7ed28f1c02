"""Real actor processes (fake engine) under full load: all of them are restarted, or one of them is stopped."""

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

import pytest

from common.client import GrpcClient, SampledGroup
from common.errors import OutriderError
from common.types import ActorState, RolloutRequest, SamplingParams
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import Member
from learner.rollouts.sampler import Sampler, build_request
from tests.helpers.actor_processes import end_actor, free_address, start_actor
from tests.helpers.fakes import make_sample, until

NUM_ACTORS = 3
SLOTS = 4
N = 2
# 0.3 s for each completion, as many at once as an actor is given: its throughput is a constant of the settings.
SETTINGS = ("fake.first_token_s=0.3", "fake.token_s=0", f"fake.max_num_seqs={SLOTS * N}", "grace_s=20")


class Actors:
    """Processes at fixed addresses."""

    def __init__(self) -> None:
        self.addresses = [free_address() for _ in range(NUM_ACTORS)]
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, address: str) -> None:
        self.processes[address] = await start_actor(address, *SETTINGS)


class Watching(GrpcClient):
    """Remembers the calls that failed after something of them had come."""

    lost: ClassVar[list[OutriderError]] = []

    async def generate(
        self, request: RolloutRequest, *, timeout_s: float, on_progress: Callable[[], None] = lambda: None
    ) -> SampledGroup:
        progressed = asyncio.Event()

        def progress() -> None:
            progressed.set()
            on_progress()

        try:
            return await super().generate(request, timeout_s=timeout_s, on_progress=progress)
        except OutriderError as error:
            if progressed.is_set():
                self.lost.append(error)
            raise


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Actors, Fleet]]:
    actors = Actors()
    fleet = Fleet(actors.addresses, run_id=None, connect=Watching, slots_per_actor=SLOTS)
    try:
        for address in actors.addresses:
            await actors.start(address)
        await fleet.start(startup_timeout_s=60, min_actors=NUM_ACTORS)
        yield actors, fleet
    finally:
        await fleet.close()
        for process in actors.processes.values():
            await end_actor(process)


@contextlib.asynccontextmanager
async def load(sampler: Sampler) -> AsyncIterator[list[SampledGroup]]:
    """More groups at any time than there is room for; those that are finished. The last ones are waited for."""
    finished: list[SampledGroup] = []
    numbers = itertools.count()
    stop = asyncio.Event()

    async def work() -> None:
        while not stop.is_set():
            number = next(numbers)
            sampling = SamplingParams(n=N, seed=number, max_tokens=4)
            request = build_request(f"g{number}", make_sample(number), sampling)
            finished.append(await sampler.sample(request, min_version=lambda: 0, expected=None))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_ACTORS * SLOTS + 2):
            tasks.create_task(work())
        yield finished
        stop.set()


@pytest.mark.slow
async def test_a_rolling_restart_loses_no_work() -> None:
    """Each actor in turn gets SIGTERM and comes back. What runs is finished; what is refused had not begun."""
    async with serving() as (actors, fleet):
        sampler = Sampler(fleet)
        before = {member.actor_id for member in fleet.members()}
        async with load(sampler) as groups:
            for i, address in enumerate(actors.addresses):
                old = fleet.members()[i]
                await until(lambda old=old: old.in_flight == SLOTS, 0.01)
                actors.processes[address].send_signal(signal.SIGTERM)
                assert await actors.processes[address].wait() == 0
                await actors.start(address)
                await until(lambda i=i, old=old: is_back(fleet.members()[i], old), 0.05)
        after = {member.actor_id for member in fleet.members()}

    assert not before & after
    assert {group.prompt.actor_id for group in groups} >= before
    assert len({group.prompt.group_id.partition(".")[0] for group in groups}) == len(groups)
    assert len({c.trajectory_id for group in groups for c in group.completions}) == N * len(groups)
    assert not Watching.lost


def is_back(member: Member, old: Member) -> bool:
    return member is not old and member.state is ActorState.SERVING


@pytest.mark.slow
async def test_a_stopped_actor_costs_its_own_share_and_no_more() -> None:
    """The others keep at least 95 % of their throughput, from the very stop on."""
    num_groups = 400  # 15 s for two actors
    async with serving() as (actors, fleet):
        victim = fleet.members()[2]
        async with load(Sampler(fleet)) as groups:
            await until(lambda: victim.in_flight == SLOTS and len(groups) > NUM_ACTORS * SLOTS, 0.01)
            actors.processes[victim.address].send_signal(signal.SIGSTOP)
            with_stopped_s = await seconds_of(groups, num_groups)
            assert not victim.reachable
            alone_s = await seconds_of(groups, num_groups)
    assert alone_s >= 0.95 * with_stopped_s


async def seconds_of(groups: list[SampledGroup], count: int) -> float:
    """Until so many more are finished."""
    target, started_at = len(groups) + count, time.monotonic()
    await until(lambda: len(groups) >= target, 0.005)
    return time.monotonic() - started_at
