"""The fleet: who may get a group, and what it says about comings and goings."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from common.config import ConfigError
from common.errors import EngineDead, Paused, QueueFull, Unreachable
from common.types import ActorState, ActorStatus
from learner.rollouts.discovery import Discovery
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent, Member
from tests.helpers.fakes import FakeActor, FakeClient, until
from tests.simulation.loop import VirtualLoop


class Watch:
    """The fleet's events, to wait for."""

    def __init__(self, fleet: Fleet) -> None:
        self.seen: list[FleetEvent] = []
        self._changed = asyncio.Event()
        fleet.subscribe(self._add)

    def _add(self, event: FleetEvent) -> None:
        self.seen.append(event)
        self._changed.set()

    async def until(self, kind: str, state: ActorState | None = None) -> FleetEvent:
        while True:
            for event in self.seen:
                if event.kind == kind and (state is None or event.state is state):
                    self.seen.remove(event)
                    return event
            self._changed.clear()
            await self._changed.wait()


@asynccontextmanager
async def running(
    *actors: FakeActor, run_id: str | None = None, slots: int = 2, min_actors: int | None = None
) -> AsyncIterator[tuple[Fleet, Watch]]:
    by_address = {actor.address: actor for actor in actors}
    fleet = Fleet(
        list(by_address),
        run_id=run_id,
        connect=lambda address: by_address[address].connect(),
        slots_per_actor=slots,
        poll_s=0.001,
    )
    watch = Watch(fleet)
    await fleet.start(startup_timeout_s=10, min_actors=len(actors) if min_actors is None else min_actors)
    try:
        yield fleet, watch
    finally:
        await fleet.close()


def any_version() -> int:
    return 0


async def hold(fleet: Fleet, release: asyncio.Event, got: Callable[[Member], None]) -> None:
    async with fleet.slot(any_version) as member:
        got(member)
        await release.wait()


async def test_the_least_busy_serving_actor_gets_it() -> None:
    one, two, loading = FakeActor("one"), FakeActor("two"), FakeActor("three", state=ActorState.LOADING)
    async with running(one, two, loading) as (fleet, _), asyncio.TaskGroup() as tasks:
        release, got = asyncio.Event(), []
        for _ in range(5):
            tasks.create_task(hold(fleet, release, lambda member: got.append(member.address)))
        await until(lambda: len(got) >= 4)
        assert sorted(got) == ["one", "one", "two", "two"]
        assert [member.in_flight for member in fleet.members()] == [2, 2, 0]
        release.set()
    assert len(got) == 5


async def test_versions_gate_and_a_commit_opens() -> None:
    actor = FakeActor("one", run_id="mine", version=7)
    async with running(actor, run_id="mine") as (fleet, _):
        (member,) = fleet.members()
        # Version 7 of who knows what: only what the publisher committed counts.
        assert member.version == -1
        waiting = asyncio.ensure_future(anext(aiter_slot(fleet, 3)))
        fleet.mark_committed("one", "someone else", 9)
        fleet.mark_committed("one", actor.actor_id, 2)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        fleet.mark_committed("one", actor.actor_id, 3)
        assert (await waiting).address == "one"


async def test_actors_that_reach_a_version_together_share_what_waits_for_it() -> None:
    one, two, three = (FakeActor(name, run_id="mine") for name in ("one", "two", "three"))
    async with running(one, two, three, run_id="mine", slots=64) as (fleet, _):
        release, got = asyncio.Event(), []
        async with asyncio.TaskGroup() as tasks:
            for _ in range(6):
                tasks.create_task(hold(fleet, release, lambda member: got.append(member.address)))
            await asyncio.sleep(0)
            assert not got
            for actor in (one, two, three):
                fleet.mark_committed(actor.address, actor.actor_id, 0)
            await until(lambda: len(got) == 6)
            assert sorted(got) == ["one", "one", "three", "three", "two", "two"]
            release.set()


async def aiter_slot(fleet: Fleet, version: int) -> AsyncIterator[Member]:
    async with fleet.slot(lambda: version) as member:
        yield member


async def test_another_learner_took_the_actor_over() -> None:
    actor = FakeActor("one", run_id="mine")
    async with running(actor, run_id="mine") as (fleet, watch):
        fleet.mark_committed("one", actor.actor_id, 4)
        actor.run_id, actor.state = "other", ActorState.PENDING_WEIGHTS
        await watch.until("state", ActorState.PENDING_WEIGHTS)
        assert fleet.members()[0].version == -1


async def test_a_restart_is_another_actor() -> None:
    actor = FakeActor("one", run_id="mine")
    async with running(actor, run_id="mine") as (fleet, watch):
        old = fleet.members()[0]
        client = old.client
        fleet.mark_committed("one", actor.actor_id, 4)
        await watch.until("joined")
        actor.restart()
        left, joined = await watch.until("left"), await watch.until("joined")
        assert (left.actor_id, left.reason) == ("one#1", "restarted")
        assert (joined.actor_id, joined.state) == ("one#2", ActorState.PENDING_WEIGHTS)
        new = fleet.members()[0]
        assert old.left.is_set()
        assert (new.version, new.left.is_set(), client.num_forgotten) == (-1, False, 2)  # type: ignore[attr-defined]


async def test_one_actor_behind_two_addresses_is_one() -> None:
    """As in a cluster with two IP families: twice in an epoch, it would never open."""
    actor = FakeActor("10.0.0.1:1")
    clients = {"10.0.0.1:1": actor.connect(), "[fd00::1]:1": actor.connect()}
    fleet = Fleet(list(clients), run_id=None, connect=clients.__getitem__, poll_s=0.001)
    watch = Watch(fleet)
    await fleet.start(startup_timeout_s=10)
    event = await watch.until("unreachable")
    (member,) = fleet.live()
    assert member.address != event.address
    assert event.reason == f"it is the actor that answers at {member.address}"
    # Once the one address is gone, the other one will do.
    clients[member.address].is_cut = True
    await until(lambda: [found.address for found in fleet.live()] == [event.address])
    await fleet.close()


async def test_death_and_return() -> None:
    actor = FakeActor("one")
    async with running(actor) as (fleet, watch):
        actor.kill()
        event = await watch.until("left")
        assert event.reason == "connection reset"
        assert fleet.live() == ()
        actor.restart(ActorState.SERVING, version=3)
        await watch.until("joined")
        async with fleet.slot(lambda: 3) as member:
            assert (member.actor_id, member.version) == ("one#2", 3)


async def test_a_failed_call_stops_new_groups_until_the_next_answer() -> None:
    actor = FakeActor("one")
    async with running(actor) as (fleet, watch):
        member = fleet.members()[0]
        actor.kill()
        fleet.report_failure(member, Unreachable("reset"))
        assert member.held
        await watch.until("left")


async def test_a_paused_actor_waits_without_a_grudge() -> None:
    """It keeps its place among those that get weights, and its groups when it is resumed."""
    one, two = FakeActor("one"), FakeActor("two")
    async with running(one, two) as (fleet, watch):
        member = fleet.members()[0]
        one.state = ActorState.PAUSED
        fleet.report_failure(member, Paused("by an operator"))
        assert (member.state, member.held, member.num_failures) == (ActorState.PAUSED, False, 0)
        for _ in range(3):
            async with fleet.slot(any_version) as other:
                assert other.address == "two"
        one.state = ActorState.SERVING
        await watch.until("state", ActorState.SERVING)
        async with fleet.slot(any_version, avoid={"two"}) as again:
            assert again is member


async def test_an_answer_after_a_failed_call_is_told() -> None:
    """The publisher skips a held actor, so it must hear when to go on."""
    actor = FakeActor("one")
    async with running(actor) as (fleet, watch):
        member = fleet.members()[0]
        fleet.report_failure(member, EngineDead("it says"))
        assert member.held
        event = await watch.until("recovered")
        assert (event.actor_id, event.state, member.held) == ("one#1", ActorState.SERVING, False)


async def test_waiters_keep_their_order() -> None:
    actor = FakeActor("one", version=5)
    async with running(actor, slots=1) as (fleet, _):
        served: list[str] = []

        async def ask(name: str, version: int) -> None:
            async with fleet.slot(lambda: version):
                served.append(name)

        async with fleet.slot(any_version):
            tasks = [asyncio.create_task(ask(*what)) for what in (("new", 6), ("a", 5), ("newer", 7), ("b", 0))]
            await asyncio.sleep(0)
        await asyncio.gather(tasks[1], tasks[3])
        assert served == ["a", "b"]
        actor.version = 7
        await asyncio.gather(*tasks)
        assert served == ["a", "b", "new", "newer"]


async def test_a_full_queue_is_asked_again_after_its_own_time() -> None:
    actor = FakeActor("one")
    async with running(actor) as (fleet, _):
        member = fleet.members()[0]
        fleet.report_failure(member, QueueFull(retry_after_s=0.01))
        assert (member.busy, member.held) == (True, False)
        async with fleet.slot(any_version) as again:
            assert again is member


async def test_cancelled_waiters_leave_no_slot_behind() -> None:
    actor = FakeActor("one")
    async with running(actor, slots=1) as (fleet, _):
        async with fleet.slot(any_version):
            waiters = [asyncio.ensure_future(anext(aiter_slot(fleet, 0))) for _ in range(4)]
            await asyncio.sleep(0)
            waiters[0].cancel()
            await asyncio.gather(waiters[0], return_exceptions=True)
        # The slot is free, and goes to a waiter at the loop's next turn.
        waiters[1].cancel()
        await asyncio.sleep(0)
        # It went to the third one, which is cancelled before it runs.
        waiters[2].cancel()
        await asyncio.gather(*waiters[:3], return_exceptions=True)
        assert all(waiter.cancelled() for waiter in waiters[:3])
        assert (await waiters[3]).in_flight == 1


async def test_who_leaves_before_the_turn_of_the_group_that_was_given_to_it_does_not_get_it() -> None:
    """No call to it would hear of that any more, and each would wait for its deadline."""
    one, two = FakeActor("one"), FakeActor("two")
    async with running(one, two, slots=1) as (fleet, _), fleet.slot(any_version) as other:
        gone = next(member for member in fleet.members() if member is not other)
        async with fleet.slot(any_version):
            waiter = asyncio.ensure_future(anext(aiter_slot(fleet, 0)))
            await asyncio.sleep(0)
        # Its slot is given to the waiter in the loop's next turn; it leaves in that one, and the waiter runs after it.
        asyncio.get_running_loop().call_soon(fleet._leave, fleet._places[gone.address], "killed")
        await asyncio.sleep(0)
        assert (gone.in_flight, gone.reachable, waiter.done()) == (1, False, False)
        assert (await waiter).actor_id == f"{gone.address}#1"
        assert gone.in_flight == 0


@pytest.mark.parametrize(("num_actors", "polls_of_each"), [(1, 20), (64, 20), (128, 10), (256, 5)])
def test_a_large_fleet_is_polled_less_often(num_actors: int, polls_of_each: int) -> None:
    """In 10 s of virtual time, at 0.5 s between two polls of an actor."""
    num_polls = 0

    class Counted(FakeClient):
        async def status(self, *, timeout_s: float = 5.0) -> ActorStatus:
            nonlocal num_polls
            num_polls += 1
            return await super().status(timeout_s=timeout_s)

    async def watch() -> int:
        addresses = [f"actor-{number}" for number in range(num_actors)]
        fleet = Fleet(addresses, run_id=None, connect=lambda address: Counted(FakeActor(address)), poll_s=0.5)
        await fleet.start(startup_timeout_s=10, min_actors=num_actors)
        before = num_polls
        await asyncio.sleep(10.1)
        after = num_polls
        await fleet.close()
        return after - before

    assert VirtualLoop().run(watch(), until=60.0) == num_actors * polls_of_each


async def test_silent_addresses_at_start_are_one_line() -> None:
    dead = FakeActor("10.0.0.1:50051", alive=False)
    fleet = Fleet([dead.address], run_id=None, connect=lambda _: dead.connect(), poll_s=0.001)
    with pytest.raises(
        ConfigError, match=r"no answer within 0.05 s from 10.0.0.1:50051 \(connection reset\)"
    ) as caught:
        await fleet.start(startup_timeout_s=0.05)
    assert "\n" not in str(caught.value)
    await fleet.close()


async def test_one_silent_address_is_reported_once_and_waited_for() -> None:
    up, down = FakeActor("up"), FakeActor("down", alive=False)
    async with running(up, down, min_actors=1) as (fleet, watch):
        event = await watch.until("unreachable")
        assert event.address == "down"
        down.restart()
        joined = {(await watch.until("joined")).address for _ in range(2)}
        assert joined == {"up", "down"}
        assert all(event.kind != "unreachable" for event in watch.seen)
        assert len(fleet.live()) == 2


async def test_too_few_actors_behind_a_name_are_told_apart_from_silence() -> None:
    actor = FakeActor("10.0.0.1:7")
    fleet = Fleet(["dns:///actors:7"], run_id=None, connect=lambda _: actor.connect(), resolve=Names("10.0.0.1"))
    with pytest.raises(ConfigError, match=r"0\.2 s there are 1 of rollout\.min_actors=3 actors: 10\.0\.0\.1:7;"):
        await fleet.start(startup_timeout_s=0.2, min_actors=3)
    await fleet.close()


def full_disk(kind: str) -> Callable[[FleetEvent], None]:
    def write(event: FleetEvent) -> None:
        if event.kind == kind:
            raise OSError("no space left on device")

    return write


async def test_what_ends_a_poll_is_raised_where_the_fleet_is_watched() -> None:
    """The address would never be polled again, and nobody would know."""
    actor = FakeActor("one")
    async with running(actor) as (fleet, _):
        fleet.subscribe(full_disk("left"))
        watching = asyncio.create_task(fleet.watch())
        await asyncio.sleep(0.01)
        assert not watching.done()
        actor.kill()
        with pytest.raises(OSError, match="no space left"):
            await watching


async def test_what_ends_a_poll_ends_the_start() -> None:
    actor = FakeActor("one")
    fleet = Fleet([actor.address], run_id=None, connect=lambda _: actor.connect(), poll_s=0.001)
    fleet.subscribe(full_disk("joined"))
    with pytest.raises(OSError, match="no space left"):
        await fleet.start(startup_timeout_s=10)
    await fleet.close()


def test_bad_address_lists() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Fleet([], run_id=None)
    with pytest.raises(ConfigError, match="twice"):
        Fleet(["a:1", "a:1"], run_id=None)


class Names:
    """A resolver whose answer can be changed."""

    def __init__(self, *addresses: str) -> None:
        self.answer: list[str] | OSError = list(addresses)

    async def __call__(self, host: str, port: int) -> list[str]:
        assert (host, port) == ("actors", 7)
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


@asynccontextmanager
async def discovering(names: Names, *actors: FakeActor, fixed: tuple[str, ...] = ()) -> AsyncIterator[Fleet]:
    by_address = {actor.address: actor for actor in actors}
    fleet = Fleet(
        [*fixed, "dns:///actors:7"],
        run_id=None,
        connect=lambda address: by_address[address].connect(),
        poll_s=0.001,
        discover_s=0.001,
        resolve=names,
    )
    await fleet.start(startup_timeout_s=10)
    try:
        yield fleet
    finally:
        await fleet.close()


def addresses(fleet: Fleet) -> list[str]:
    return [member.address for member in fleet.members()]


async def test_actors_come_and_go_with_their_name() -> None:
    one, two, three = (FakeActor(f"10.0.0.{i}:7") for i in (1, 2, 3))
    names = Names("10.0.0.1")
    async with discovering(names, one, two, three) as fleet:
        assert addresses(fleet) == ["10.0.0.1:7"]
        names.answer = ["10.0.0.3", "10.0.0.1", "10.0.0.2"]
        await until(lambda: len(fleet.live()) == 3)
        # Gone from DNS, but it answers: it finishes what it has.
        names.answer = ["10.0.0.2", "10.0.0.3"]
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert "10.0.0.1:7" in addresses(fleet)
        one.kill()
        await until(lambda: addresses(fleet) == ["10.0.0.2:7", "10.0.0.3:7"])
        one.restart(ActorState.SERVING)
        names.answer = ["10.0.0.1"]
        two.kill()
        three.kill()
        await until(lambda: addresses(fleet) == ["10.0.0.1:7"] and fleet.live())
        async with fleet.slot(any_version) as member:
            assert member.actor_id == "10.0.0.1:7#2"


async def test_what_a_forgotten_actor_has_sent_can_still_be_read() -> None:
    actor = FakeActor("10.0.0.1:7")
    names = Names("10.0.0.1")
    async with discovering(names, actor) as fleet:
        client = fleet.members()[0].client
        assert isinstance(client, FakeClient)
        actor.kill()
        names.answer = []
        await until(lambda: not fleet.members())
        await asyncio.sleep(0.05)
        assert not client.is_closed
    assert client.is_closed


async def test_fixed_addresses_stay() -> None:
    fixed, found = FakeActor("fixed:1"), FakeActor("10.0.0.1:7")
    names = Names("10.0.0.1")
    async with discovering(names, fixed, found, fixed=("fixed:1",)) as fleet:
        await until(lambda: len(fleet.live()) == 2)
        names.answer = []
        found.kill()
        fixed.kill()
        await until(lambda: addresses(fleet) == ["fixed:1"])


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_AGAIN, "try again"), OSError("no route")])
async def test_a_resolver_that_fails_forgets_nobody(error: OSError) -> None:
    actor = FakeActor("10.0.0.1:7")
    names = Names("10.0.0.1")
    async with discovering(names, actor) as fleet:
        names.answer = error
        actor.kill()
        await until(lambda: not fleet.live())
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert addresses(fleet) == ["10.0.0.1:7"]
        names.answer = socket.gaierror(socket.EAI_NONAME, "no such name")  # no pod is there
        await until(lambda: not addresses(fleet))
        names.answer = ["10.0.0.1"]
        actor.restart(ActorState.SERVING)
        await until(fleet.live)


async def test_an_address_that_cannot_be_connected_to_now_is_tried_again() -> None:
    """As in the middle of a rotation of certificates; at the start it is a mistake of the user."""
    actors = {f"10.0.0.{i}:7": FakeActor(f"10.0.0.{i}:7") for i in (1, 2)}
    tries = dict.fromkeys(actors, 0)

    def connect(address: str) -> FakeClient:
        tries[address] += 1
        if address == "10.0.0.2:7" and tries[address] < 3:
            raise ConfigError("tls: /certificates has no tls.key")
        return actors[address].connect()

    names = Names("10.0.0.1")
    fleet = Fleet(["dns:///actors:7"], run_id=None, connect=connect, discover_s=0.001, resolve=names)
    await fleet.start(startup_timeout_s=10)
    names.answer = ["10.0.0.1", "10.0.0.2"]
    await until(lambda: len(fleet.live()) == 2)
    assert tries == {"10.0.0.1:7": 1, "10.0.0.2:7": 3}
    await fleet.close()

    tries["10.0.0.2:7"] = 0
    at_once = Fleet(["dns:///actors:7"], run_id=None, connect=connect, resolve=Names("10.0.0.2"))
    with pytest.raises(ConfigError, match=r"has no tls\.key"):
        await at_once.start(startup_timeout_s=10)
    await at_once.close()


async def test_the_systems_own_resolver() -> None:
    assert "127.0.0.1:80" in await Discovery(["dns:///localhost:80"]).addresses()
    assert await Discovery(["dns:///does-not-exist.invalid:80", "a:1"]).addresses() == ("a:1",)
    with pytest.raises(ConfigError, match="is not an address"):
        Discovery(["dns:///actors"])
    with pytest.raises(ConfigError, match=r"'actors\.\.svc' is not a name"):
        Discovery(["dns:///actors..svc:80"])
