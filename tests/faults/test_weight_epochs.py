"""Publisher and fleet against real gRPC servers with the fake engine, over real Gloo epochs: who comes and goes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from torch import nn

from actor.config import ActorConfig
from actor.engine_fake.engine import FakeEngine
from actor.server import ActorServer
from actor.weights.transfer import Staging, WeightReceiver
from common.errors import DeadlineExceeded, StageTimeout
from common.types import ActorState, Manifest
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent
from learner.weights import deltas
from learner.weights.epoch import UpdateTimes
from learner.weights.publisher import Publisher, UpdatesFailed
from learner.weights.snapshot import Snapshotter
from tests.helpers.fakes import until

_RUN_ID = "run"


class _Actor:
    """One address; each `start` is a new incarnation of the actor there."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self.incarnation = 0
        self.server: ActorServer | None = None

    async def start(self) -> None:
        config = ActorConfig.model_validate({"engine": "fake", "fake": {"token_s": 0}})
        self.incarnation += 1
        actor_id = f"{id(self)}-{self.incarnation}"
        self.engine = FakeEngine(config.fake, actor_id)
        self.server = ActorServer(self.engine, await self.engine.start(), config, actor_id)
        self.address = f"127.0.0.1:{await self.server.start(self.address)}"

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(grace_s=0)
            await self.engine.stop()
            self.server = None

    @property
    def serves(self) -> tuple[ActorState, int] | None:
        return (self.server.policy.state, self.server.policy.policy_version) if self.server is not None else None


class _Learner:
    """A model of two tensors, its fleet and its publisher."""

    def __init__(self, actors: list[_Actor]) -> None:
        self.actors = actors
        self.model = nn.Linear(64, 64)
        self.snapshotter = Snapshotter(self.model, [], is_sender=True, bucket_bytes=4096)
        self.fleet = Fleet([actor.address for actor in actors], run_id=_RUN_ID, poll_s=0.05)
        self.publisher: Publisher
        self.task: asyncio.Task[None]
        self.ends = False
        self.notes: list[str] = []
        self.events: list[FleetEvent] = []
        self.updates: list[UpdateTimes] = []
        self.fleet.subscribe(self.events.append)

    def publish(self, version: int) -> None:
        with torch.no_grad():
            self.model.weight.fill_(float(version))
        snapshot = self.snapshotter.take(version)
        assert snapshot is not None
        self.publisher.submit(snapshot)

    async def all_serve(self, version: int, *actors: _Actor) -> None:
        """Both sides agree: the actors serve it, and the fleet gives them prompts of it."""
        for actor in actors:
            await until(lambda actor=actor: actor.serves == (ActorState.SERVING, version), 0.01)
            member = next(m for m in self.fleet.members() if m.address == actor.address)
            await until(lambda member=member: member.version == version or member.left.is_set(), 0.01)
            assert member.state is ActorState.SERVING


@contextlib.asynccontextmanager
async def _running(
    num_actors: int, num_started: int, *, delta: bool = False, timeout_s: float = 10.0
) -> AsyncIterator[_Learner]:
    actors = [_Actor() for _ in range(num_actors)]
    for actor in actors:
        await actor.start()  # also those that come later: so that their port is known
    for actor in actors[num_started:]:
        await actor.stop()
    learner = _Learner(actors)
    await learner.fleet.start(startup_timeout_s=10, min_actors=num_started)
    learner.publisher = Publisher(
        learner.fleet,
        run_id=_RUN_ID,
        host="127.0.0.1",
        backend="gloo",
        timeout_s=timeout_s,
        notify=learner.notes.append,
        delta=delta,
        on_update=learner.updates.append,
    )
    task = learner.task = asyncio.create_task(learner.publisher.run())
    try:
        yield learner
        assert learner.ends or not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await learner.fleet.close()
        for actor in actors:
            await actor.stop()


@pytest.mark.timeout(60)
async def test_every_version_reaches_every_actor() -> None:
    async with _running(3, 3) as learner:
        for version in range(4):
            learner.publish(version)
            await learner.all_serve(version, *learner.actors)


@pytest.mark.timeout(60)
async def test_a_late_joiner_is_caught_up_and_the_others_keep_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    async with _running(3, 2) as learner:
        first, second, late = learner.actors
        learner.publish(5)
        await learner.all_serve(5, first, second)
        learner.events.clear()

        async def commit(_: int) -> float:
            raise AssertionError("it has this version")

        with monkeypatch.context() as patch:
            patch.setattr(first.engine, "commit", commit)
            patch.setattr(second.engine, "commit", commit)
            await late.start()
            await learner.all_serve(5, first, second, late)
        # Nobody else changed state for it, nor paused.
        assert {event.address for event in learner.events} == {late.address}
        learner.publish(6)
        await learner.all_serve(6, first, second, late)


@pytest.mark.timeout(60)
async def test_a_dead_actor_does_not_hold_up_the_others_and_comes_back_as_a_new_one() -> None:
    async with _running(2, 2) as learner:
        stays, dies = learner.actors
        learner.publish(1)
        await learner.all_serve(1, stays, dies)
        await dies.stop()
        learner.publish(2)  # the fleet may not know yet that one is gone
        await learner.all_serve(2, stays)
        await dies.start()
        await learner.all_serve(2, stays, dies)
        learner.publish(3)
        await learner.all_serve(3, stays, dies)


@pytest.mark.timeout(60)
async def test_a_failed_call_to_an_actor_that_is_up_to_date_ends_no_epoch() -> None:
    async with _running(2, 2) as learner:
        learner.publish(1)
        await learner.all_serve(1, *learner.actors)
        learner.fleet.report_failure(learner.fleet.live()[0], DeadlineExceeded("a group past its deadline"))
        await until(lambda: learner.events[-1].kind == "recovered", 0.01)
        learner.publish(2)
        await learner.all_serve(2, *learner.actors)
        assert learner.publisher._last_epoch == 1


@pytest.mark.timeout(60)
async def test_an_actor_that_leaves_ends_the_epoch() -> None:
    """The others hear of it before there is a version that they would wait for in vain."""
    async with _running(2, 2) as learner:
        stays, leaves = learner.actors
        learner.publish(1)
        await learner.all_serve(1, stays, leaves)
        await leaves.stop()
        await until(lambda: learner.publisher._last_epoch == 2, 0.01)
        learner.publish(2)
        await learner.all_serve(2, stays)
        assert learner.publisher._last_epoch == 2


@pytest.mark.timeout(60)
async def test_nobody_there_for_a_while() -> None:
    async with _running(1, 1) as learner:
        (actor,) = learner.actors
        learner.publish(1)
        await learner.all_serve(1, actor)
        await actor.stop()
        await until(lambda: not learner.fleet.live(), 0.01)
        learner.publish(2)
        learner.publish(3)
        await actor.start()
        await learner.all_serve(3, actor)


@pytest.mark.timeout(60)
async def test_an_actor_that_refuses_every_update_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with _running(2, 2) as learner:
        well, sick = learner.actors

        async def refuse(*_: object) -> tuple[int, ...]:
            raise StageTimeout("its card has fallen off the bus")

        monkeypatch.setattr(sick.engine, "stage", refuse)
        for version in range(1, 4):
            learner.publish(version)
            await learner.all_serve(version, well)
        assert "staging version 1 failed: its card has fallen off the bus" in learner.notes[0]


@pytest.mark.timeout(60)
async def test_an_actor_too_slow_for_an_update_delays_the_others_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, and finishes groups, but takes no bucket in. In the middle of the chain it makes everybody late."""
    async with _running(3, 3, timeout_s=1.0) as learner:
        first, slow, last = learner.actors
        learner.publish(0)
        await learner.all_serve(0, first, slow, last)

        receive = WeightReceiver.receive

        def late(self: WeightReceiver, manifest: Manifest, staging: Staging) -> "Future[tuple[int, ...]]":
            return Future() if self in slow.engine._updates._receivers else receive(self, manifest, staging)

        monkeypatch.setattr(WeightReceiver, "receive", late)
        learner.notes.clear()
        for version in range(1, 4):
            learner.publish(version)
            await learner.all_serve(version, first, last)
        assert len(learner.notes) == 1
        held = [event.address for event in learner.events if event.kind == "held"]
        assert held == [slow.address]
        # When it can again, and its rest is over, it is caught up.
        monkeypatch.setattr(WeightReceiver, "receive", receive)
        await learner.all_serve(3, first, slow, last)


@pytest.mark.timeout(60)
async def test_an_actor_whose_engine_stands_still_delays_the_others_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server answers all that it need not ask the engine for, so that the fleet takes it for well."""
    async with _running(2, 2, timeout_s=1.0) as learner:
        well, hangs = learner.actors
        learner.publish(0)
        await learner.all_serve(0, well, hangs)

        goes_on = asyncio.Event()
        with monkeypatch.context() as patch:
            for name in ("open_epoch", "stage", "commit", "abort_epoch"):
                patch.setattr(hangs.engine, name, _after(goes_on, getattr(hangs.engine, name)))
            learner.notes.clear()
            for version in range(1, 4):
                learner.publish(version)
                await learner.all_serve(version, well)
            assert len(learner.notes) == 1
            assert [event.address for event in learner.events if event.kind == "held"] == [hangs.address]
            goes_on.set()
        # When it can again, and its rest is over, it is caught up.
        await learner.all_serve(3, well, hangs)


@pytest.mark.timeout(60)
async def test_an_actor_that_cannot_reach_the_rendezvous_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It speaks gRPC with the learner; its way to the learner's TCPStore is closed, as by a network policy."""
    async with _running(3, 3, timeout_s=2.0) as learner:
        first, cut_off, last = learner.actors
        open_epoch = cut_off.engine.open_epoch
        monkeypatch.setattr(cut_off.engine, "open_epoch", lambda spec: open_epoch(replace(spec, master_port=1)))
        for version in range(3):
            learner.publish(version)
            await learner.all_serve(version, first, last)
        assert "the rendezvous at 127.0.0.1:1 cannot be reached" in learner.notes[0]
        assert {event.address for event in learner.events if event.kind == "held"} == {cut_off.address}
        monkeypatch.setattr(cut_off.engine, "open_epoch", open_epoch)
        await learner.all_serve(2, first, cut_off, last)


def _after(event: asyncio.Event, call: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    async def waits(*arguments: object) -> object:
        await event.wait()
        return await call(*arguments)

    return waits


@pytest.mark.timeout(60)
async def test_updates_that_never_succeed_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.weights.publisher._GIVE_UP_S", 1.0)
    async with _running(1, 1) as learner:
        learner.ends = True

        async def refuse(*_: object) -> tuple[int, ...]:
            raise StageTimeout("no room")

        monkeypatch.setattr(learner.actors[0].engine, "stage", refuse)
        learner.publish(1)
        with pytest.raises(UpdatesFailed, match=r"no weight update has succeeded in \d s and \d+ tries; .*no room"):
            await learner.task


@pytest.mark.timeout(60)
async def test_deltas_between_full_updates_for_whoever_has_no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actors check the result of every delta; only sizes say which updates were deltas."""
    monkeypatch.setattr(deltas, "_clock_s", lambda: 0.0)  # encoding takes no time: a delta wins if it is smaller
    async with _running(2, 2, delta=True) as learner:
        first, second = learner.actors
        sizes: list[list[int]] = []

        async def publish(version: int) -> None:
            learner.updates.clear()
            learner.publish(version)
            await learner.all_serve(version, first, second)
            sizes.append([times.num_bytes for times in learner.updates])

        for version in range(3):
            await publish(version)
        await second.stop()
        await until(lambda: len(learner.fleet.live()) == 1, 0.01)
        await second.start()
        await learner.all_serve(2, first, second)  # caught up in full
        await publish(3)
        whole = sum(p.numel() * 4 for p in learner.model.parameters())
        assert sizes[0] == [whole]
        for [size] in sizes[1:]:
            assert size < whole / 4
