"""The publisher with actors that are a few lines each: what each of them really has after its updates."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import pytest
import structlog
import torch

from common.dtypes import tensor_in
from common.errors import Draining, InvalidRequest, OutriderError, StageTimeout, Unreachable
from common.types import LORA_A, LORA_B, ActorState, ActorStatus, EpochSpec, Manifest
from learner.model.lora import FILE_PREFIX, merge
from learner.rollouts.members import FleetEvent, Member
from learner.weights import epoch as epoch_module
from learner.weights import publisher as module
from learner.weights.buckets import Buckets, BucketWriter, NotFilled
from learner.weights.epoch import UpdateTimes
from learner.weights.publisher import Publisher
from learner.weights.snapshot import AdapterFacts, Snapshot
from tests.helpers.fakes import until

WEIGHT = "l.q.weight"
A, B = FILE_PREFIX + "l.q" + LORA_A, FILE_PREFIX + "l.q" + LORA_B


def buckets(**tensors: torch.Tensor) -> Buckets:
    return BucketWriter(tensors.items(), 1024).write(tensors.items())


def snapshot(version: int) -> Snapshot:
    """A base model of ones, and an adapter that adds version + 1."""
    adapter = buckets(**{A: torch.ones(1, 2), B: torch.full((2, 1), version + 1.0)})
    base = buckets(**{WEIGHT: torch.ones(2, 2)})
    return Snapshot(version, adapter, base, trains_vision=False, adapter=AdapterFacts(1, {"l.q": WEIGHT}))


class Wire:
    """Everybody has at once what was sent last."""

    port = 1

    def __init__(self) -> None:
        self.buffers: Sequence[torch.Tensor] = ()
        self.checksums: tuple[int, ...] = ()
        self.began = asyncio.Event()
        self.sent = asyncio.Event()

    async def join(self, spec: EpochSpec) -> "Wire":
        return self

    async def send(self, buffers: Sequence[torch.Tensor], filled: Sequence[Future[int]]) -> None:
        self.sent.clear()
        self.began.set()
        self.checksums = tuple([await asyncio.wrap_future(is_filled) for is_filled in filled])
        self.buffers = buffers
        self.sent.set()

    def abort(self) -> None:
        pass


class Actor:
    """The client of an actor, and the actor."""

    def __init__(self, name: str, wire: Wire, max_lora_rank: int) -> None:
        self.name = name
        self.base = torch.ones(2, 2)
        self.adapter: tuple[torch.Tensor, torch.Tensor] | None = None
        self.refusal: dict[str, OutriderError] = {}
        self.hangs = asyncio.Event()
        self.hangs.set()
        self._wire = wire
        self._limit = max_lora_rank
        self._staged: Manifest

    @property
    def weight(self) -> float:
        return (merge(self.base, *self.adapter, 1.0) if self.adapter else self.base)[0, 0].item()

    async def status(self, **_: object) -> ActorStatus:
        return ActorStatus(self.name, ActorState.SERVING, 0, "run", 1, -1, 0, 0, 1, self._limit)

    async def open_epoch(self, spec: EpochSpec) -> None:
        pass

    async def abort(self, *_: object, **__: object) -> None:
        pass

    async def stage(self, run_id: str, epoch: int, manifest: Manifest, *, timeout_s: float) -> tuple[int, ...]:
        if "stage" in self.refusal:
            raise self.refusal["stage"]
        await self._wire.sent.wait()
        self._staged = manifest
        return self._wire.checksums

    async def commit(self, *_: object, **__: object) -> float:
        if "commit" in self.refusal:
            raise self.refusal["commit"]
        await self.hangs.wait()
        tensors = {p.name: tensor_in(self._wire.buffers[p.bucket], p).clone() for p in self._staged.parameters}
        self.base = tensors.get(WEIGHT, self.base)
        self.adapter = (tensors[A], tensors[B]) if self._staged.adapter else None
        return 0.0


class Fleet:
    """As much of the real one as the publisher knows."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.wire = Wire()
        self.publisher: Publisher
        self.tell: Callable[[FleetEvent | None], None]

    def subscribe(self, callback: Any) -> None:
        self.tell = callback

    def live(self) -> tuple[Member, ...]:
        return tuple(self.members)

    def mark_committed(self, address: str, actor_id: str, version: int) -> None:
        self.member(actor_id).version = version

    def report_failure(self, member: Member, error: OutriderError) -> None:
        member.held = True

    def member(self, name: str) -> Member:
        return next(member for member in self.members if member.actor_id == name)

    async def add(self, name: str, max_lora_rank: int = 16) -> Actor:
        actor = Actor(name, self.wire, max_lora_rank)
        status = await actor.status()
        self.members.append(Member(name, cast("Any", actor), 4, name, ActorState.SERVING, status=status))
        self.tell(None)
        return actor

    def drop(self, name: str) -> None:
        member = self.member(name)
        self.members.remove(member)
        member.state = None
        member.left.set()
        self.tell(None)

    def recover(self, name: str) -> None:
        self.member(name).held = False
        self.tell(None)

    async def all_at(self, version: int, *names: str) -> None:
        await until(lambda: all(self.member(name).version == version for name in names), 0.001)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[Fleet, "asyncio.Task[None]"]]:
    fleet = Fleet()
    fleet.publisher = Publisher(
        cast("Any", fleet), run_id="run", host="", backend="sim", timeout_s=5, transport=fleet.wire
    )
    task = asyncio.create_task(fleet.publisher.run())
    try:
        yield fleet, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.timeout(20)
async def test_who_is_current_while_a_newcomer_changes_the_form_has_the_adapter_once() -> None:
    async with running() as (fleet, _):
        one, two = await fleet.add("one"), await fleet.add("two")
        await fleet.add("old", max_lora_rank=0)  # all have it merged
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "one", "two", "old")
        fleet.drop("old")
        new = await fleet.add("new")
        await fleet.all_at(0, "new")
        for version in (1, 2):
            fleet.publisher.submit(snapshot(version))
            await fleet.all_at(version, "one", "two", "new")
            assert [actor.weight for actor in (one, two, new)] == [version + 2.0] * 3


@pytest.mark.timeout(20)
async def test_who_is_held_while_the_form_changes_has_the_adapter_once() -> None:
    async with running() as (fleet, _):
        held, well = await fleet.add("held"), await fleet.add("well")
        await fleet.add("old", max_lora_rank=0)
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "held", "well", "old")
        fleet.member("held").held = True
        fleet.drop("old")
        fleet.publisher.submit(snapshot(1))
        await fleet.all_at(1, "well")
        fleet.recover("held")
        await fleet.all_at(1, "held")
        assert (held.weight, well.weight) == (3.0, 3.0)


@pytest.mark.timeout(20)
async def test_one_bad_actor_ends_no_run_that_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest version stays the newest for longer than updates may fail."""
    monkeypatch.setattr(module, "_GIVE_UP_S", 0.5)
    async with running() as (fleet, task):
        await fleet.add("well")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "well")
        bad = await fleet.add("bad")
        bad.refusal["stage"] = InvalidRequest("manifest.parameters", "another model")
        for _ in range(5):
            await until(lambda: fleet.member("bad").held or task.done(), 0.001)
            await asyncio.sleep(0.25)  # past the publisher's pause after a failure: it has looked at the others
            assert not task.done(), task.exception()
            fleet.recover("bad")


@pytest.mark.timeout(20)
async def test_a_commit_that_fails_or_lasts_is_that_actors_own() -> None:
    async with running() as (fleet, _):
        await fleet.add("well")
        drains, slow = await fleet.add("drains"), await fleet.add("slow")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "well", "drains", "slow")
        drains.refusal["commit"] = Draining("this actor is draining")
        slow.hangs.clear()
        fleet.publisher.submit(snapshot(1))
        await fleet.all_at(1, "well")  # while another one has not answered yet
        assert (fleet.member("drains").version, fleet.member("slow").version) == (0, 0)
        slow.hangs.set()
        await fleet.all_at(1, "slow")
        assert fleet.publisher._last_epoch == 1  # nothing was sent again


@pytest.mark.timeout(20)
async def test_who_hangs_in_a_commit_keeps_the_others_once_and_then_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_module, "_LAST_COMMIT_S", 0.05)
    async with running() as (fleet, _):
        await fleet.add("well")
        hangs = await fleet.add("hangs")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "well", "hangs")
        hangs.hangs.clear()
        fleet.publisher.submit(snapshot(1))
        await until(lambda: fleet.member("hangs").held, 0.001)
        fleet.recover("hangs")  # its server is well
        for version in (2, 3):
            fleet.publisher.submit(snapshot(version))
            await fleet.all_at(version, "well")
        assert not fleet.member("hangs").held
        assert fleet.member("hangs").version == 0
        assert [member.actor_id for member in fleet.publisher._epoch.members] == ["well"]


@pytest.mark.timeout(20)
async def test_after_a_long_step_an_update_has_connections_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (fleet, _):
        await fleet.add("one")
        epochs = []
        for version, longest_idle_s in enumerate((120.0, 120.0, -1.0, 120.0)):
            monkeypatch.setattr(module, "_LONGEST_IDLE_S", longest_idle_s, raising=False)
            fleet.publisher.submit(snapshot(version))
            await fleet.all_at(version, "one")
            epochs.append(fleet.publisher._last_epoch)
        assert epochs == [1, 1, 2, 2]


@pytest.mark.timeout(20)
async def test_who_was_late_for_an_adapter_gets_the_adapter_alone() -> None:
    async with running() as (fleet, _):
        await fleet.add("one")
        late = await fleet.add("late")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "one", "late")
        late.refusal["stage"] = StageTimeout("late")
        fleet.publisher.submit(snapshot(1))
        await fleet.all_at(1, "one")
        late.refusal.clear()
        fleet.recover("late")
        await fleet.all_at(1, "late")
        assert len(fleet.wire.buffers) == 1  # the model, which it has, would be another
        assert late.weight == 3.0


@pytest.mark.timeout(20)
async def test_a_fleet_that_dies_of_each_update_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the host's memory does not hold the second set of layers: it comes back each time."""
    monkeypatch.setattr(module, "_GIVE_UP_S", 0.3)
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    async with running() as (fleet, task):
        fleet.publisher.submit(snapshot(0))
        for i in range(50):
            dies = await fleet.add(f"life{i}")
            dies.refusal["stage"] = Unreachable("it was killed")
            await until(lambda i=i: fleet.member(f"life{i}").held or task.done(), 0.001)  # type: ignore[misc]
            if task.done():
                break
            await asyncio.sleep(0.02)  # as long as it takes to die
            fleet.drop(f"life{i}")
            await asyncio.sleep(0.02)  # the publisher looks who is there: nobody
        assert "no weight update has succeeded" in str(task.exception())


@pytest.mark.timeout(20)
async def test_who_serves_a_version_was_updated_whatever_became_of_another() -> None:
    async with running() as (fleet, _):
        told: list[UpdateTimes] = []
        fleet.publisher._on_update = told.append
        await fleet.add("well")
        drains = await fleet.add("drains")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "well", "drains")
        drains.refusal["commit"] = Draining("this actor is draining")
        with structlog.testing.capture_logs() as logs:
            fleet.publisher.submit(snapshot(1))
            await until(lambda: fleet.member("drains").held, 0.001)
        assert fleet.member("well").version == 1
        assert all(times.num_bytes for times in told)
        assert len(told) == 2
        published = [(entry["version"], entry["num_actors"]) for entry in logs if entry["event"] == "published"]
        assert published[-1] == (1, 1)  # that of version 0 may be told after `drains` serves it


@pytest.mark.timeout(20)
async def test_time_without_any_actor_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GIVE_UP_S", 0.2)
    async with running() as (fleet, task):
        gone = await fleet.add("gone")
        gone.refusal["stage"] = Unreachable("preempted")
        fleet.publisher.submit(snapshot(0))
        await until(lambda: fleet.member("gone").held, 0.001)
        fleet.drop("gone")
        await asyncio.sleep(0.4)  # longer than updates may fail
        new = await fleet.add("new")
        new.refusal["stage"] = Unreachable("preempted too")
        await until(lambda: fleet.member("new").held or task.done(), 0.001)
        new.refusal.clear()
        fleet.recover("new")
        await until(lambda: fleet.member("new").version == 0 or task.done(), 0.001)
        assert not task.done(), task.exception()


@pytest.mark.timeout(20)
async def test_actors_that_die_of_each_update_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long they take to come back."""
    monkeypatch.setattr(module, "_RETRY_S", 0.001)
    async with running() as (fleet, task):
        fleet.publisher.submit(snapshot(0))
        for i in range(module._MOST_LOSSES + 1):
            assert not task.done()
            name = f"life-{i}"
            actor = await fleet.add(name)
            actor.refusal["commit"] = Unreachable("out of memory")
            await until(lambda name=name: fleet.member(name).held or task.done(), 0.001)
            fleet.drop(name)
        with pytest.raises(module.UpdatesFailed, match=r"and all actors were gone 10 times; .* out of memory"):
            await task


def unfilled(version: int) -> Snapshot:
    """As `snapshot`; its adapter is still being gathered."""
    whole = snapshot(version)
    checksums: tuple[Future[int], ...] = tuple(Future() for _ in whole.trained.checksums)
    for checksum in checksums:
        checksum.set_running_or_notify_cancel()
    return replace(whole, trained=replace(whole.trained, checksums=checksums))


def fill(taken: Snapshot) -> None:
    for checksum in taken.trained.checksums:
        checksum.set_result(7)


@pytest.mark.timeout(20)
async def test_an_update_goes_out_while_it_is_gathered_if_there_is_time() -> None:
    async with running() as (fleet, _):
        one = await fleet.add("one")
        for version in range(2):
            fleet.wire.began.clear()
            taken = unfilled(version)
            fleet.publisher.submit(taken)
            if version == 0:  # nobody knows how long it takes
                await until(lambda: fleet.publisher._epoch is not None)
                await asyncio.sleep(0.01)
                assert not fleet.wire.began.is_set()
            else:
                await fleet.wire.began.wait()
            fill(taken)
            await fleet.all_at(version, "one")
            assert one.weight == version + 2.0


@pytest.mark.timeout(20)
@pytest.mark.parametrize("why", ["the last gather was long", "an adapter is merged", "there may be a delta"])
async def test_an_update_waits_until_it_is_gathered(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (fleet, _):
        await fleet.add("one", max_lora_rank=0 if why == "an adapter is merged" else 16)
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "one")
        if why == "the last gather was long":
            monkeypatch.setattr(module, "GATHER_SHARE", 0.0)
        fleet.publisher._deltas.enabled = why == "there may be a delta"
        fleet.wire.began.clear()
        taken = unfilled(1)
        fleet.publisher.submit(taken)
        await asyncio.sleep(0.01)
        assert not fleet.wire.began.is_set()
        fill(taken)
        await fleet.all_at(1, "one")


@pytest.mark.timeout(20)
async def test_who_waited_for_a_gather_in_vain_is_well_and_gets_the_next_one_when_it_is_whole() -> None:
    async with running() as (fleet, _):
        one = await fleet.add("one")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "one")
        one.refusal["stage"] = StageTimeout("late")
        taken = unfilled(1)
        fleet.publisher.submit(taken)
        await until(lambda: fleet.publisher._num_failures, 0.001)
        assert not fleet.member("one").held
        one.refusal.clear()
        fleet.wire.began.clear()
        await until(lambda: fleet.publisher._epoch is not None, 0.001)
        await asyncio.sleep(0.01)
        assert not fleet.wire.began.is_set()
        fill(taken)
        await fleet.all_at(1, "one")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("is_first", [True, False])
async def test_a_gather_that_breaks_off_is_the_trainers_to_tell(is_first: bool) -> None:
    async with running() as (fleet, task):
        await fleet.add("one")
        if not is_first:
            fleet.publisher.submit(snapshot(0))
            await fleet.all_at(0, "one")
            fleet.wire.began.clear()
        taken = unfilled(1)
        fleet.publisher.submit(taken)
        if not is_first:
            await fleet.wire.began.wait()
        taken.trained.checksums[0].set_exception(NotFilled("a rank is gone"))
        await until(lambda: fleet.publisher._snapshot is None, 0.001)
        await until(lambda: fleet.publisher._epoch is None or is_first, 0.001)
        assert not task.done()
        assert not fleet.member("one").held
        fleet.publisher.submit(snapshot(2))
        await fleet.all_at(2, "one")


@pytest.mark.timeout(20)
async def test_a_gather_that_has_broken_off_before_it_is_sent_ends_nothing() -> None:
    async with running() as (fleet, task):
        await fleet.add("one")
        fleet.publisher.submit(snapshot(0))
        await fleet.all_at(0, "one")
        taken = unfilled(1)
        taken.trained.checksums[0].set_exception(NotFilled("a rank is gone"))
        fleet.publisher._snapshot = taken  # as it is before the publisher has seen the end of the gather
        fleet.publisher._wake.set()
        await until(lambda: not fleet.publisher._wake.is_set())
        await asyncio.sleep(0)
        assert not task.done()
        fleet.publisher.submit(snapshot(2))
        await fleet.all_at(2, "one")
