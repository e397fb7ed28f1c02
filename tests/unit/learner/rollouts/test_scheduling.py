"""Who gets a group, by hand-made members."""

import asyncio

import pytest

from common.errors import Unreachable
from common.types import ActorState, SamplingParams
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import Member
from learner.rollouts.sampler import Sampler, build_request
from learner.rollouts.scheduling import choose, finished, has_slot, is_hung
from tests.helpers.fakes import FakeActor, make_sample, until

IMAGE = b"sha256 of an image"


def member(name: str, in_flight: int = 0, group_s: float = 0.0, media: tuple[bytes, ...] = ()) -> Member:
    actor = FakeActor(name, media=set(media))
    made = Member(name, actor.connect(), slots=4, actor_id=f"{name}#1", state=ActorState.SERVING)
    made.in_flight, made.group_s = in_flight, group_s
    return made


def test_the_least_busy_comes_first() -> None:
    members = [member("a", 2), member("b", 1), member("c", 3)]
    assert choose(members).address == "b"
    assert choose(members, avoid={"b#1"}).address == "a"
    assert choose(members, avoid={"a#1", "b#1", "c#1"}).address == "b"


def test_a_slow_actor_is_given_less() -> None:
    """At 6 s a group against 2 s, it gets one group for three of the others. A new one is taken for fast."""
    slow, fast, new = member("slow", group_s=6.0), member("fast", group_s=2.0), member("new")
    for _ in range(12):
        choose([slow, fast]).in_flight += 1
    assert (slow.in_flight, fast.in_flight) == (3, 9)
    new.in_flight = 8
    assert choose([slow, new]).address == "slow"
    assert choose([slow, fast, new]).address == "new"


def test_small_differences_are_noise_and_large_ones_have_a_bound() -> None:
    near, far, fast = member("near", group_s=1.4), member("far", group_s=1000.0), member("fast", group_s=1.0)
    assert choose([near, fast]).address == "near"
    fast.in_flight = 4
    assert choose([fast, far]).address == "far"


def test_seconds_follow_what_an_actor_does_now() -> None:
    actor = member("a")
    finished(actor, 10.0)
    assert actor.group_s == 10.0
    finished(actor, 5.0)
    assert actor.group_s == pytest.approx(9.0)


@pytest.mark.parametrize(("ahead", "chosen"), [(0, "holder"), (1, "holder"), (2, "other"), (3, "other")])
def test_images_go_where_they_are_within_a_bound(ahead: int, chosen: str) -> None:
    other, holder = member("other", 0), member("holder", ahead, media=(IMAGE,))
    assert choose([other, holder], media=[IMAGE]).address == chosen


def test_a_part_of_the_images_is_no_reason() -> None:
    other, holder = member("other", 0), member("holder", 1, media=(IMAGE,))
    assert choose([other, holder], media=[IMAGE, b"another"]).address == "other"


def test_one_group_at_a_time_after_a_failure() -> None:
    actor = member("a", 1)
    assert has_slot(actor)
    actor.num_failures = 1
    assert not has_slot(actor)
    actor.in_flight = 0
    assert has_slot(actor)
    actor.in_flight = 1
    finished(actor, 1.0)
    assert has_slot(actor)


def test_hung_is_who_gets_nowhere_while_others_do() -> None:
    hung, other = member("hung", 1), member("other", 1)
    hung.busy_since, other.progressed_at = 100.0, 108.0
    assert not is_hung(hung, [hung, other], now=109.0, hung_s=10.0)
    assert is_hung(hung, [hung, other], now=111.0, hung_s=10.0)
    assert not is_hung(hung, [hung], now=111.0, hung_s=10.0)
    other.progressed_at = 90.0
    assert not is_hung(hung, [hung, other], now=111.0, hung_s=10.0)
    other.progressed_at = 108.0
    hung.progressed_at = 105.0
    assert not is_hung(hung, [hung, other], now=111.0, hung_s=10.0)
    hung.progressed_at, hung.in_flight = 100.0, 0
    assert not is_hung(hung, [hung, other], now=111.0, hung_s=10.0)
    hung.in_flight, hung.held = 1, True
    assert not is_hung(hung, [hung, other], now=111.0, hung_s=10.0)


async def test_the_groups_of_a_hung_actor_go_elsewhere() -> None:
    """It answers every poll, but its engine stands still."""
    gate = asyncio.Event()
    hung, other = FakeActor("hung", gate=gate), FakeActor("other")
    actors = {"hung": hung, "other": other}
    fleet = Fleet(["hung", "other"], run_id=None, connect=lambda a: actors[a].connect(), poll_s=0.001, hung_s=0.05)
    await fleet.start(startup_timeout_s=10, min_actors=2)
    sampler = Sampler(fleet)
    reasons: list[str] = []
    fleet.subscribe(lambda event: reasons.append(event.reason) if event.kind == "held" else None)

    async def sample(number: int) -> str:
        request = build_request(f"g{number}", make_sample(number), SamplingParams(n=2))
        return (await sampler.sample(request, min_version=lambda: 0, expected=None)).prompt.actor_id

    first = [asyncio.ensure_future(sample(number)) for number in range(4)]
    await until(lambda: hung.num_running)
    more: list[asyncio.Future[str]] = []
    while not all(task.done() for task in first):
        more.append(asyncio.ensure_future(sample(len(more) + 4)))  # the other one gets on
        await asyncio.sleep(0.001)
    assert {task.result() for task in first} == {"other#1"}
    assert sampler.retries["HUNG"] >= 1
    assert "nothing came from hung for 0.05 s" in reasons
    gate.set()
    await asyncio.gather(*more)
    await fleet.close()


async def test_every_transition_has_a_reason() -> None:
    actor = FakeActor("one")
    fleet = Fleet(["one"], run_id=None, connect=lambda _: actor.connect(), poll_s=0.001)
    told: list[tuple[str, str]] = []
    fleet.subscribe(lambda event: told.append((event.kind, event.reason)))
    await fleet.start(startup_timeout_s=10)
    fleet.report_failure(fleet.members()[0], Unreachable("reset"))
    await until(lambda: told[-1][0] == "recovered")
    actor.state = ActorState.DRAINING
    await until(lambda: told[-1][0] == "state")
    actor.kill()
    await until(lambda: told[-1][0] == "left")
    assert told == [
        ("joined", ""),
        ("held", "reset"),
        ("recovered", "it answers"),
        ("state", "it says so"),
        ("left", "connection reset"),
    ]
    await fleet.close()
