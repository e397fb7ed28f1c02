"""One group on a fleet that misbehaves."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.client import SampledGroup
from common.errors import DeadlineExceeded, EngineDead, InvalidRequest, MediaMissing, OutriderError, QueueFull
from common.types import ActorState, ChatPrompt, SamplingParams
from learner.rollouts import sampler as module
from learner.rollouts.fleet import Fleet
from learner.rollouts.sampler import GroupFailed, Sampler, build_request
from learner.rollouts.tripwire import ImageMismatch
from learner.types import PixelBounds
from tests.helpers.fakes import FakeActor, FakeClient, make_sample, process, sample_all, until
from tests.simulation.loop import VirtualLoop

SAMPLE = make_sample(3, (b"image",))
REQUEST = build_request("run.3", SAMPLE, SamplingParams(n=2))


def any_version() -> int:
    return 0


@asynccontextmanager
async def sampler(*actors: FakeActor, max_attempts: int = 8) -> AsyncIterator[Sampler]:
    by_address = {actor.address: actor for actor in actors}
    fleet = Fleet(list(by_address), run_id=None, connect=lambda a: by_address[a].connect(), poll_s=0.001)
    await fleet.start(startup_timeout_s=10, min_actors=len(actors))
    yield Sampler(fleet, max_attempts=max_attempts)
    assert all(member.in_flight == 0 for member in fleet.members())
    await fleet.close()


def gated(name: str) -> FakeActor:
    """Its groups wait for its gate; it is of the run."""
    return FakeActor(name, gate=asyncio.Event(), run_id="run", max_turns=1)


def open_gate(actor: FakeActor) -> None:
    assert actor.gate is not None
    actor.gate.set()


@asynccontextmanager
async def learner(*actors: FakeActor, restart: bool = False) -> AsyncIterator[Sampler]:
    """Of the run; the first actor has its version 0."""
    by_address = {actor.address: actor for actor in actors}
    fleet = Fleet(list(by_address), run_id="run", connect=lambda a: by_address[a].connect(), poll_s=0.001)
    await fleet.start(startup_timeout_s=10, min_actors=len(actors))
    fleet.mark_committed(actors[0].address, actors[0].actor_id, 0)
    yield Sampler(fleet, restart_on_update=restart)
    assert all(member.in_flight == 0 for member in fleet.members())
    await fleet.close()


def test_request_carries_chat_and_images() -> None:
    assert REQUEST.prompt == ChatPrompt(SAMPLE.messages)
    (item,) = REQUEST.media
    assert item.encoded == b"image"
    assert item.sha256.hex() == "6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"


def test_request_carries_the_bounds_of_images() -> None:
    sample = dataclasses.replace(
        make_sample(0, (b"a", b"b")), image_bounds=(PixelBounds(max_pixels=7), PixelBounds(3, None))
    )
    media = build_request("g", sample, SamplingParams()).media
    assert [(item.min_pixels, item.max_pixels) for item in media] == [(None, 7), (3, None)]


def test_request_carries_the_arguments_of_the_template() -> None:
    sample = dataclasses.replace(make_sample(0), template_arguments={"enable_thinking": False})
    request = build_request("g", sample, SamplingParams())
    assert request.prompt == ChatPrompt(sample.messages, {"enable_thinking": False})


async def test_a_group_comes_back_whole() -> None:
    async with sampler(FakeActor("one")) as sample:
        got = await sample.sample(REQUEST, min_version=any_version, expected=process(SAMPLE))
        assert got.prompt.group_id == "run.3.0"
        assert [completion.index for completion in got.completions] == [0, 1]


@pytest.mark.parametrize("error", [EngineDead("x"), QueueFull(retry_after_s=0.001), DeadlineExceeded("late")])
async def test_a_failing_actor_is_replaced_by_another(error: OutriderError) -> None:
    bad, good = FakeActor("bad", failure=error), FakeActor("good", state=ActorState.LOADING)
    async with sampler(bad, good) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        await until(lambda: bad.requests)
        good.state = ActorState.SERVING
        got = await task
        assert got.prompt.actor_id == "good#1"
        # A new attempt has a new name, so its trajectories can not be mistaken for those of the first one.
        assert got.prompt.group_id == f"run.3.{len(bad.requests)}"
        assert sample.retries == {error.reason: len(bad.requests)}


async def test_an_actor_whose_store_others_fill_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    async def wait(delay_s: float) -> None:
        waits.append(delay_s)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": wait}))
    actor = FakeActor("full", failure=MediaMissing((b"\0" * 32,)))
    async with sampler(actor, max_attempts=8) as sample:
        with pytest.raises(GroupFailed, match="failed 8 times"):
            await sample.sample(REQUEST, min_version=any_version, expected=None)
        (member,) = sample.fleet.live()
        assert (member.held, member.num_failures) == (False, 0)
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


async def test_a_group_that_fails_everywhere_is_given_up() -> None:
    actor = FakeActor("one", failure=EngineDead("again"))
    async with sampler(actor, max_attempts=3) as sample:
        with pytest.raises(GroupFailed, match="failed 3 times, last: again") as caught:
            await sample.sample(REQUEST, min_version=any_version, expected=None)
        assert caught.value.reason == "ATTEMPTS_EXHAUSTED"
        assert [request.group_id for request in actor.requests] == ["run.3.0", "run.3.1", "run.3.2"]


async def test_an_actor_that_fails_fast_does_not_draw_all_groups_to_itself() -> None:
    """It answers every poll, and fails every group at once: the others finish them all."""
    sick = FakeActor("sick", failure=EngineDead("its GPU is gone"))
    well = FakeActor("well")
    async with sampler(sick, well, max_attempts=3) as sample:
        requests = [build_request(f"run.{i}", SAMPLE, SamplingParams(n=2)) for i in range(500)]
        groups = await sample_all(sample, requests)
        assert {group.prompt.actor_id for group in groups} == {"well#1"}
        assert len(sick.requests) < 3 * 64  # its slots, once for each time that it was tried


async def test_a_group_that_failed_on_an_actor_goes_to_another_one() -> None:
    first, second = FakeActor("first"), FakeActor("second")
    async with sampler(first, second) as sample:
        fleet = sample.fleet
        async with fleet.slot(any_version, frozenset({"first#1"})) as a, fleet.slot(any_version) as b:
            assert [a.address, b.address] == ["second", "first"]
        async with fleet.slot(any_version, frozenset({"first#1", "second#1"})):
            pass  # better than nobody


async def test_busy_is_no_failure() -> None:
    actor = FakeActor("one", failure=QueueFull(retry_after_s=0.0))
    async with sampler(actor, max_attempts=1) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        await until(lambda: len(actor.requests) >= 3)
        actor.failure = None
        assert len((await task).completions) == 2


async def test_a_request_that_no_actor_takes_fails_at_once() -> None:
    actor = FakeActor("one", failure=InvalidRequest("sampling.n", "too many"))
    async with sampler(actor) as sample:
        with pytest.raises(GroupFailed, match=r"sampling\.n: too many") as caught:
            await sample.sample(REQUEST, min_version=any_version, expected=None)
        assert caught.value.reason == "INVALID_REQUEST"
        assert len(actor.requests) == 1


async def test_who_joins_with_smaller_limits_is_at_fault() -> None:
    """It is idle, so that it would draw all groups to itself."""
    small = FakeActor("small", state=ActorState.LOADING, failure=InvalidRequest("sampling.n", "the limit is 1"))
    well = FakeActor("well")
    async with sampler(small, well) as sample:
        requests = [build_request(f"run.{i}", SAMPLE, SamplingParams(n=2)) for i in range(500)]
        await sample_all(sample, requests[:1])
        small.state = ActorState.SERVING
        groups = await sample_all(sample, requests)
        assert {group.prompt.actor_id for group in groups} == {"well#1"}
        assert 0 < len(small.requests) < 2 * 64
        (member,) = [member for member in sample.fleet.live() if member.address == "small"]
        assert member.num_failures > 0


def test_a_fleet_that_is_replaced_by_one_with_smaller_limits_is_believed_in_the_end() -> None:
    """Else the run would neither go on nor end."""

    async def main() -> float:
        actor = FakeActor("a")
        async with sampler(actor) as sample:
            await sample_all(sample, [REQUEST])
            actor.restart(ActorState.SERVING)
            actor.failure = InvalidRequest("sampling.n", "the limit is 1")
            await until(lambda: sample.fleet.live() and sample.fleet.live()[0].actor_id == "a#2", 0.001)
            for reason in ("ATTEMPTS_EXHAUSTED", "INVALID_REQUEST"):
                with pytest.raises(GroupFailed) as caught:
                    await sample.sample(REQUEST, min_version=any_version, expected=None)
                assert caught.value.reason == reason
            return asyncio.get_running_loop().time()

    assert 600 < VirtualLoop().run(main(), until=5000.0) < 800


async def test_the_word_of_who_has_finished_groups_counts() -> None:
    """Whatever failed in between: no other actor is asked, and nobody is at fault."""
    actors = [FakeActor(name) for name in ("one", "two", "three")]
    async with sampler(*actors) as sample:
        await sample_all(sample, [build_request(f"run.{i}", SAMPLE, SamplingParams(n=2)) for i in range(30)])
        assert all(actor.requests for actor in actors)
        for actor, member in zip(actors, sample.fleet.live(), strict=True):
            actor.failure = InvalidRequest("chat", "too long")
            actor.requests.clear()
            member.num_failures = 1
        with pytest.raises(GroupFailed, match="chat: too long") as caught:
            await sample.sample(REQUEST, min_version=any_version, expected=None)
        assert caught.value.reason == "INVALID_REQUEST"
        assert sum(len(actor.requests) for actor in actors) == 1
        assert not any(member.held for member in sample.fleet.live())


async def test_many_actors_that_joined_with_smaller_limits_do_not_outvote_the_others() -> None:
    well = FakeActor("well")
    small = [
        FakeActor(f"small{i}", state=ActorState.LOADING, failure=InvalidRequest("sampling.n", "the limit is 1"))
        for i in range(5)
    ]
    requests = [build_request(f"run.{i}", SAMPLE, SamplingParams(n=2)) for i in range(200)]
    async with sampler(well, *small) as sample:
        await sample_all(sample, requests[:1])
        for actor in small:
            actor.state = ActorState.SERVING
        groups = await sample_all(sample, requests)
        assert {group.prompt.actor_id for group in groups} == {"well#1"}
        # Their slots, once; not all that waits, again and again.
        assert all(len(actor.requests) < 2 * 64 for actor in small)


async def test_who_joins_with_smaller_limits_has_no_say_while_the_others_are_away() -> None:
    """Else a run would drop its groups until it ends, because its good actors restart."""
    small = FakeActor("small", state=ActorState.LOADING, failure=InvalidRequest("sampling.n", "the limit is 1"))
    well = FakeActor("well")
    async with sampler(small, well) as sample:
        requests = [build_request(f"run.{i}", SAMPLE, SamplingParams(n=2)) for i in range(100)]
        await sample_all(sample, requests)
        small.state = ActorState.SERVING
        well.kill()
        await until(lambda: len(sample.fleet.live()) == 1)
        tasks = [asyncio.ensure_future(sample_all(sample, requests[:5])) for _ in range(20)]
        num_requests = len(small.requests)
        await until(lambda: len(small.requests) > num_requests)
        well.restart(ActorState.SERVING)
        for groups in await asyncio.gather(*tasks):
            assert {group.prompt.actor_id for group in groups} == {"well#2"}


async def test_an_actor_that_is_gone_is_not_waited_for() -> None:
    """It neither answers nor closes the connection: what the polls see ends the call, long before the deadline."""
    hung, other = FakeActor("hung", gate=asyncio.Event()), FakeActor("other", state=ActorState.LOADING)
    async with sampler(hung, other) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        await until(lambda: hung.num_running)
        hung.kill()
        other.state = ActorState.SERVING
        assert (await task).prompt.actor_id == "other#1"
        assert sample.retries == {"UNREACHABLE": 1}
        assert hung.num_running == 0


async def test_what_an_actor_has_sent_before_it_ended_is_taken() -> None:
    """A drained actor ends when it has answered: its learner may see that it is gone before it has read the answers."""
    arrives = asyncio.Event()

    class OnItsWay(FakeClient):
        async def generate(self, *arguments: Any, **options: Any) -> SampledGroup:
            sampled = await super().generate(*arguments, **options)
            self.actor.kill()
            await arrives.wait()
            return sampled

    class Drained(FakeActor):
        def connect(self) -> FakeClient:
            return OnItsWay(self)

    async with sampler(Drained("a"), FakeActor("b")) as s:
        drained = s.fleet.members()[0]
        work = asyncio.ensure_future(s.sample(REQUEST, min_version=any_version, expected=process(SAMPLE)))
        await drained.left.wait()
        await asyncio.sleep(0.05)
        arrives.set()
        assert (await work).prompt.actor_id == drained.actor_id
        assert not s.retries


async def test_a_group_on_an_actor_that_another_run_takes_over_is_sampled_again() -> None:
    """It would come back with that run's tokens, under spans that say nothing of a run."""
    one, two = gated("one"), gated("two")
    async with learner(one, two) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        await until(lambda: one.num_running == 1)
        one.run_id, one.version = "other", 300
        sample.fleet.mark_committed("two", two.actor_id, 0)
        await until(lambda: two.num_running == 1)
        open_gate(one)
        open_gate(two)
        assert (await task).prompt.actor_id == "two#1"
        assert sample.retries == {"WEIGHTS_PENDING": 1}


async def test_an_actor_that_another_run_has_taken_over_unseen_refuses() -> None:
    """The fleet knows at its next poll only."""
    one, two = gated("one"), gated("two")
    open_gate(one)
    open_gate(two)
    async with learner(one, two) as sample:
        one.run_id = "other"  # no poll comes between
        sample.fleet.mark_committed("two", two.actor_id, 0)
        got = await sample.sample(REQUEST, min_version=any_version, expected=None)
        assert got.prompt.actor_id == "two#1"
        assert [request.run_id for request in one.requests + two.requests] == ["run", "run"]


async def test_lost_images_stop_at_once() -> None:
    def lose(sampled: SampledGroup) -> SampledGroup:
        return dataclasses.replace(sampled, prompt=dataclasses.replace(sampled.prompt, media=()))

    actor = FakeActor("one", change=lose)
    async with sampler(actor) as sample:
        with pytest.raises(ImageMismatch, match="1 images were sent, the actor used 0"):
            await sample.sample(REQUEST, min_version=any_version, expected=process(SAMPLE))
        assert len(actor.requests) == 1


async def test_many_come_back_in_order() -> None:
    async with sampler(FakeActor("one"), FakeActor("two")) as sample:
        samples = [make_sample(row) for row in range(100)]
        requests = [build_request(f"eval.{s.row}", s, SamplingParams(temperature=0)) for s in samples]
        results = await sample_all(sample, requests, expected=[process(s) for s in samples])
        for sent, result in zip(samples, results, strict=True):
            assert np.array_equal(result.prompt.expanded_ids, process(sent).input_ids)


async def test_a_version_that_nobody_serves_yet_is_waited_for() -> None:
    actor = FakeActor("one", version=1)
    async with sampler(actor) as sample:
        task = asyncio.ensure_future(sample_all(sample, [REQUEST], min_version=2))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not actor.requests
        actor.version = 2
        await task
        assert actor.requests[0].min_policy_version == 2


@pytest.mark.parametrize("restart", [True, False])
async def test_an_update_breaks_a_group_off_only_if_asked_to(restart: bool) -> None:
    """Restarted three times; then it goes on, or a long group would never end."""
    actor = gated("one")
    async with learner(actor, restart=restart) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        for version in range(1, 6):
            restarts = min(version - 1, 3) if restart else 0
            await until(lambda restarts=restarts: len(actor.requests) == 1 + restarts and actor.num_running == 1)
            actor.version = version
            sample.fleet.mark_committed("one", actor.actor_id, version)
        open_gate(actor)
        got = await task
        restarts = 3 if restart else 0
        assert [request.group_id for request in actor.requests] == [f"run.3.{i}" for i in range(1 + restarts)]
        assert got.prompt.group_id == f"run.3.{restarts}"
        spans = {(span.policy_version, span.start) for sampled in got.completions for span in sampled.version_spans}
        assert spans == ({(3, 0), (5, 1)} if restart else {(0, 0), (5, 1)})
        assert sample.retries == ({"POLICY_CHANGED": 3} if restart else {})
        assert not sample.fleet.members()[0].held


@pytest.mark.parametrize("restart", [True, False])
async def test_a_group_that_ends_before_the_update_is_told_of_is_of_one_version_too(restart: bool) -> None:
    """Its actor commits, and finishes it, before the other members of the epoch have answered."""
    actor = gated("one")
    async with learner(actor, restart=restart) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        await until(lambda: actor.num_running == 1)
        actor.version = 1
        open_gate(actor)
        spans = {span.policy_version for sampled in (await task).completions for span in sampled.version_spans}
        assert spans == ({1} if restart else {0, 1})
        assert sample.retries == ({"POLICY_CHANGED": 1} if restart else {})


async def test_an_actor_that_joins_breaks_off_no_group_of_the_others() -> None:
    """The epoch that catches it up is one of all, and says of all that they serve what they served before."""
    actor = gated("one")
    async with learner(actor, restart=True) as sample:
        task = asyncio.ensure_future(sample.sample(REQUEST, min_version=any_version, expected=None))
        await until(lambda: actor.num_running == 1)
        sample.fleet.mark_committed("one", actor.actor_id, 0)
        for _ in range(20):
            await asyncio.sleep(0)
        open_gate(actor)
        assert (await task).prompt.group_id == "run.3.0"
        assert sample.retries == {}
