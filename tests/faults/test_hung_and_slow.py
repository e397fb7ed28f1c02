"""Real actor processes (fake engine), one of which stands still while its server answers, or is slow."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from common.pb.admin.v1 import admin_pb2
from common.pb.admin.v1.admin_pb2_grpc import AdminServiceStub
from common.rpc.channel import open_channel
from common.types import ActorState, RolloutRequest, SamplingParams
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent
from learner.rollouts.sampler import Sampler, build_request
from tests.helpers.actor_processes import actor, free_address
from tests.helpers.fakes import make_sample, sample_all, until

# More than the other actor stands still on a busy machine.
HUNG_S = 4.0


@contextlib.asynccontextmanager
async def fleet_of(*seconds: float, slots: int) -> AsyncIterator[Fleet]:
    """An actor for each number: the seconds that its groups take."""
    addresses = [free_address() for _ in seconds]
    fleet = Fleet(addresses, run_id=None, slots_per_actor=slots, poll_s=0.1, hung_s=HUNG_S)
    async with contextlib.AsyncExitStack() as stack:
        for address, group_s in zip(addresses, seconds, strict=True):
            await stack.enter_async_context(actor(address, f"fake.first_token_s={group_s}", "fake.token_s=0"))
        stack.push_async_callback(fleet.close)
        await fleet.start(startup_timeout_s=30, min_actors=len(seconds))
        await until(lambda: all(member.state is ActorState.SERVING for member in fleet.members()), 0.02)
        yield fleet


def request(number: int) -> RolloutRequest:
    return build_request(f"g{number}", make_sample(number), SamplingParams(n=1, seed=number))


@pytest.mark.alone
async def test_a_hung_actor_is_dropped_and_its_groups_go_elsewhere() -> None:
    slots = 4
    async with fleet_of(0.1, 0.1, slots=slots) as fleet:
        events: list[FleetEvent] = []
        fleet.subscribe(events.append)
        sampler = Sampler(fleet)
        victim, other = fleet.members()
        channel = open_channel(victim.address)
        admin = AdminServiceStub(channel)
        work = asyncio.ensure_future(sample_all(sampler, [request(i) for i in range(100)]))
        await until(lambda: victim.in_flight == slots, 0.002)
        num_stuck = (await admin.Pause(admin_pb2.PauseRequest())).num_running
        groups = await work

        held = [(event.address, event.reason) for event in events if event.kind == "held"]
        assert (victim.address, f"nothing came from {victim.address} for {HUNG_S:g} s") in held
        assert 1 <= num_stuck <= slots
        assert sampler.retries["HUNG"] >= num_stuck
        assert sampler.retries.keys() <= {"HUNG", "PAUSED"}
        again = [group for group in groups if not group.prompt.group_id.endswith(".0")]
        assert {group.prompt.actor_id for group in again} == {other.actor_id}

        await admin.Resume(admin_pb2.ResumeRequest())
        await channel.close()
        await until(lambda: victim.state is ActorState.SERVING, 0.02)
        groups = await sample_all(sampler, [request(i) for i in range(100, 140)])
        assert {group.prompt.actor_id for group in groups} == {victim.actor_id, other.actor_id}


@pytest.mark.alone
async def test_a_slow_actor_is_given_less() -> None:
    """Of ten groups at a time one that needs four times as long gets two, where it would get five by load alone.

    A third one weighs (2 + 1) * 4 there, against 7 + 1 on the other (`scheduling.choose`).
    """
    num_at_once, num_groups = 10, 120
    async with fleet_of(0.5, 2.0, slots=num_at_once) as fleet:
        sampler = Sampler(fleet)
        slow = fleet.members()[1]
        numbers = itertools.count()
        counts: Counter[str] = Counter()

        async def work() -> None:
            while (number := next(numbers)) < num_groups:
                group = await sampler.sample(request(number), min_version=lambda: 0, expected=None)
                # From when it has shown how slow it is, and the groups that it got before are done.
                if counts or (slow.group_s and slow.in_flight <= 2):
                    counts[group.prompt.actor_id] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_at_once):
                tasks.create_task(work())
    # Two of ten make a seventeenth of the groups; by load alone it would be a fifth.
    assert 0 < counts[slow.actor_id] < 0.12 * counts.total()
    assert counts.total() > 80
