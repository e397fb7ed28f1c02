"""One learner incarnation: the real rollouts, publisher and ledger, with a trainer that only counts.

As `learner.control` puts them together, but on one loop, and with clients and a wire that are simulated.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.types import Completion, SamplingParams
from learner.data.ledger import Ledger
from learner.rewards.base import RewardError
from learner.rollouts.buffer import GroupBuffer
from learner.rollouts.credits import Credits
from learner.rollouts.dispatcher import Dispatcher
from learner.rollouts.fleet import Fleet
from learner.rollouts.sampler import Sampler
from learner.types import Group, PromptSample, Scores
from learner.weights.buckets import Update
from learner.weights.deltas import Base, Deltas
from learner.weights.publisher import Publisher
from learner.weights.snapshot import Snapshot
from tests.helpers.fakes import FakeProcessor, Rows
from tests.simulation.actors import SimClient
from tests.simulation.policy import fill, snapshot

if TYPE_CHECKING:
    from tests.simulation.world import World


class SignallingBuffer(GroupBuffer):
    """A buffer whose reader waits on the event loop instead of a thread."""

    def __init__(self, max_groups: int) -> None:
        super().__init__(max_groups)
        self.news = asyncio.Event()

    def put(self, group: Group) -> None:
        super().put(group)
        self.news.set()

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self.news.set()


class SimRewards:
    """Takes a while, and fails now and then."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def score(self, sample: PromptSample, completions: Sequence[Completion]) -> Scores:
        rng = self._world.rng
        await asyncio.sleep(rng.random() * 0.3)
        if rng.random() < 0.02:
            raise RewardError("REWARD_RAISED", "the judge has no opinion")
        equal = rng.random() < 0.2
        return Scores(np.array([0.0 if equal else i for i in range(len(completions))], np.float32), {})


class SimDeltas(Deltas):
    """Sends each bucket as the difference of two numbers, as often as it may."""

    async def _encode(self, base: Base, snapshot: Snapshot, link_bytes_s: float) -> Update | None:
        manifest, buffers, checksums = snapshot.update(full=False, keep=True)
        buckets = tuple(replace(bucket, delta_bytes=1, word_bytes=1) for bucket in manifest.buckets)
        sent = tuple(new - old for new, old in zip(buffers, base.buckets.buffers, strict=True))
        return Update(replace(manifest, buckets=buckets, base_version=base.version), sent, checksums)


class SimPublisher(Publisher):
    """Merges an adapter, and makes deltas, at once: a real thread has no place on a virtual clock."""

    def __init__(self, fleet: Fleet, *, sends_deltas: bool, **settings: Any) -> None:
        super().__init__(fleet, **settings)
        self._deltas = SimDeltas(enabled=sends_deltas)

    async def _whole(self, snapshot: Snapshot, *, full: bool, merged: bool) -> Update:
        return snapshot.update(full=full, merged=merged, keep=self._deltas.enabled and not merged)


class SimLearner:
    """Trains from `ledger` at `version` on; `run` ends when the last step is done."""

    def __init__(self, world: "World", number: int, ledger: Ledger, version: int) -> None:
        self._world = world
        self.number = number
        self.ledger = ledger
        self.version = version
        self.run_id = f"run{number}"
        self.trained: list[int] = []
        self.dead = False
        self.longest_gap_s = 0.0
        plan = world.plan
        self.fleet = Fleet(
            plan.targets,
            run_id=self.run_id,
            connect=lambda address: SimClient(world.actors[address], self),
            slots_per_actor=plan.slots,
            poll_s=plan.poll_s,
            status_timeout_s=2.0,
            hung_s=plan.hung_s,
            discover_s=3.0,
            resolve=world.resolve,
        )
        self._buffer = SignallingBuffer((plan.max_staleness + 1) * plan.batch)
        self.dispatcher = Dispatcher(
            dataset=Rows(world.num_rows),
            ledger=ledger,
            processor=FakeProcessor(),
            sampler=Sampler(
                self.fleet,
                group_timeout_s=plan.group_timeout_s,
                max_attempts=plan.max_attempts,
                restart_on_update=plan.restart_on_update,
            ),
            rewards=SimRewards(world),
            buffer=self._buffer,
            credits=Credits(plan.batch, plan.max_staleness, step=version, total_steps=plan.total_steps),
            sampling=SamplingParams(n=plan.n),
            run_id=self.run_id,
            num_threads=1,
            drop_uniform_groups=plan.drop_uniform_groups,
        )

    async def run(self) -> None:
        """To the last step, and until every actor that is there serves it."""
        try:
            await self.fleet.start(startup_timeout_s=300.0)
            publisher = SimPublisher(
                self.fleet,
                sends_deltas=self._world.plan.sends_deltas,
                run_id=self.run_id,
                host="",
                backend="sim",
                timeout_s=5.0,
                transport=self._world.wire,
            )
            self._check_commits()
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(loop) for loop in (self.fleet.watch(), publisher.run(), self.dispatcher.run())
                ]
                await self._train(publisher)
                await self._world.quiet.wait()
                await self._all_serve()
                for loop in loops:
                    loop.cancel()
        finally:
            await self.fleet.close()

    async def _train(self, publisher: Publisher) -> None:
        plan, world = self._world.plan, self._world
        await self._publish(publisher)
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while self.version < plan.total_steps:
            groups = await self._take()
            world.check_batch(self, groups)
            await asyncio.sleep(world.rng.random() * plan.train_s)
            self.ledger.mark_trained(group.sequence for group in groups)
            self.trained += [group.sequence for group in groups]
            self.version += 1
            if self.version > 1:  # the first one waits for the actors
                self.longest_gap_s = max(self.longest_gap_s, loop.time() - last_s)
            last_s = loop.time()
            self.dispatcher.set_version(self.version)
            await self._publish(publisher)
            if self.version % plan.checkpoint_every == 0:
                world.checkpoint(self)

    async def _publish(self, publisher: Publisher) -> None:
        """What the ranks gather, and what is sent meanwhile."""
        plan = self._world.plan
        taken = snapshot(self.number, self.version, is_adapter=plan.trains_adapter)
        publisher.submit(taken)
        is_long = plan.gather_s and self._world.rng.random() < 0.1
        await fill(taken, plan.gather_s * (30 if is_long else 1))

    async def _take(self) -> list[Group]:
        plan = self._world.plan
        while True:
            self._buffer.news.clear()
            with contextlib.suppress(TimeoutError):
                return self._buffer.take(
                    plan.batch, version=self.version, max_staleness=plan.max_staleness, timeout_s=0
                )
            await self._buffer.news.wait()

    async def _all_serve(self) -> None:
        """Faults are over: everybody comes back and up to date."""
        changed = asyncio.Event()
        self.fleet.subscribe(lambda _: changed.set())
        while not self._world.all_serve(self):
            changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await changed.wait()

    def _check_commits(self) -> None:
        """What the fleet is told to be served is served."""
        mark = self.fleet.mark_committed

        def checked(address: str, actor_id: str, version: int) -> None:
            self._world.check_commit(self, actor_id, version)
            mark(address, actor_id, version)

        self.fleet.mark_committed = checked  # type: ignore[method-assign]
