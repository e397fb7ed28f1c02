"""One schedule from its seed to its end, and what must hold all along.

| invariant | checked |
|---|---|
| no token is sampled from torn, corrupt or half-loaded weights, nor from another version than is said | each token |
| the fleet believes a version of an actor only if that very process serves it, whole | each commit |
| a trained group is whole, of one process, of its row, really sampled, by this run, fresh enough | each batch |
| each sequence number is trained once, or dropped and counted, also if the learner is killed | the end |
| no group is given up as wrong because an actor came back that refuses what others take | the end |
| nobody waits for ever, and once faults stop every actor comes to serve the newest version | bounded virtual time |
| no exception goes unseen, no task and no slot is left | the end |
"""

import asyncio
import gc
import random
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from actor.weights.policy_state import PolicyState
from common.errors import TooLarge
from common.types import ActorState, ChatPrompt, Completion, RolloutRequest, TextPart
from learner.data.ledger import Ledger
from learner.types import Group, PromptSample
from tests.simulation.actors import SimActor, SimEngine
from tests.simulation.faults import EXTRA_S, KINDS, OTHER_KINDS
from tests.simulation.learner import SimLearner
from tests.simulation.loop import VirtualLoop
from tests.simulation.plan import Fault, Plan, make_plan
from tests.simulation.policy import Policy
from tests.simulation.wire import Wire

# Rests of an actor that failed grow to two minutes, and there may be several in a row.
LIMIT_S = 1500.0


class Broken(AssertionError):  # noqa: N818 - says what an invariant is
    """An invariant does not hold."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one schedule."""

    virtual_s: float
    faults: tuple[Fault, ...]
    num_trained: int
    dropped: Counter[str]
    retries: Counter[str]
    """Groups that were sent again, by reason."""
    refused: Counter[str]
    """Requests that came to an actor that does not serve, by its state."""
    longest_gap_s: float
    """Between two optimizer steps."""


def simulate(seed: int, plan: Callable[[random.Random], Plan] = make_plan) -> Result:
    """Run one schedule. Raises `Broken` or `Stuck`."""
    rng = random.Random(seed)
    loop = VirtualLoop(lambda: rng.random() * 0.01)
    world = World(rng, loop, plan(rng))
    loop.run(world.main(), until=LIMIT_S + world.last_s + world.plan.total_steps * world.plan.train_s)
    return world.check_end()


class World:
    """The machines of one schedule."""

    def __init__(self, rng: random.Random, loop: VirtualLoop, plan: Plan) -> None:
        self.rng = rng
        self.plan = plan
        self.num_rows = rng.choice((3, 7, 20))
        self.wire = Wire()
        self.processes: dict[str, tuple[PolicyState, SimEngine]] = {}
        self.actors = {address: SimActor(self, address, rng) for address in self.plan.addresses}
        self.deployed = set(() if plan.scale else plan.addresses)
        self.refused: Counter[str] = Counter()
        self.dns_works = True
        self.timeline: list[int] = []
        """Sequence numbers trained, by those learners whose work was not lost."""
        self._timeline: list[int] = []
        self.dropped: Counter[str] = Counter()
        self.quiet = asyncio.Event()
        self._loop = loop
        self._sampled: dict[str, AbstractSet[int]] = {}
        self._used: set[str] = set()
        self._checkpoint: tuple[int, dict[str, Any], list[int]] = (0, Ledger(0, self.num_rows).to_dict(), [])
        self._num_runs = 0
        self._num_replaced = 0
        self._learner: SimLearner | None = None
        self._learner_task: asyncio.Task[None] | None = None
        self._broken: Broken | None = None

    # ---------------------------------------------------------------------------------------------- the course of it

    async def main(self) -> None:
        for actor in [self.actors[address] for address in sorted(self.deployed)]:
            if len(self.actors) == 1 or self.rng.random() < 0.8:
                actor.start()
            else:
                self.later(self.rng.uniform(0.1, 5), actor.restart)
        faults = asyncio.create_task(self._faults())
        for at_s, num_actors in self.plan.scale:
            self.later(at_s, lambda num_actors=num_actors: self._scale(num_actors))  # type: ignore[misc]
        task = self._begin_learner()
        while True:
            await asyncio.wait({task})
            if self._broken is not None:
                raise self._broken
            if not task.cancelled():
                task.result()
            if self._learner_task is not None and task is not self._learner_task:  # it has begun beside this one
                task = self._learner_task
            elif task.cancelled():
                task = self._begin_learner()
            else:
                break
        learner = self._learner
        assert learner is not None
        self.timeline = [*self._timeline, *learner.trained]
        self.dropped.update({reason: len(sequences) for reason, sequences in learner.ledger.dropped.items()})
        await faults
        await self._stop_actors()

    def _begin_learner(self) -> asyncio.Task[None]:
        self._num_runs += 1
        version, ledger, self._timeline = self._checkpoint
        restored = Ledger.from_dict(ledger, seed=0, num_rows=self.num_rows)
        self._learner = SimLearner(self, self._num_runs, restored, version)
        self._learner_task = asyncio.create_task(self._learner.run())
        return self._learner_task

    async def _stop_actors(self) -> None:
        for actor in self.actors.values():
            actor.kill()
        await asyncio.sleep(1)

    def later(self, delay_s: float, function: Callable[[], None]) -> None:
        self._loop.call_later(delay_s, function)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(0.01)
        if not self.dns_works:
            raise OSError("no route to the resolver")
        if not self.deployed:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [address.removesuffix(":1") for address in sorted(self.deployed)]

    def sample_of(self, request: RolloutRequest) -> PromptSample:
        assert isinstance(request.prompt, ChatPrompt)
        return PromptSample(0, request.prompt.messages, (), None)

    # ---------------------------------------------------------------------------------------------- faults

    async def _faults(self) -> None:
        for fault in self.plan.faults:
            await asyncio.sleep(max(0.0, fault.at_s - self._loop.now))
            actor = self.actors[self.plan.addresses[fault.actor]]
            (KINDS | OTHER_KINDS)[fault.kind](self, actor, fault.for_s)
        await asyncio.sleep(max(0.0, self.last_s - self._loop.now))
        self.quiet.set()

    @property
    def last_s(self) -> float:
        """When the last fault is over."""
        ends = [fault.at_s + fault.for_s for fault in self.plan.faults] + [at_s for at_s, _ in self.plan.scale]
        return max(ends, default=-EXTRA_S) + EXTRA_S

    def _scale(self, num_actors: int) -> None:
        """As a Deployment: the first `num_actors` run, the others get SIGTERM."""
        for i, (address, actor) in enumerate(self.actors.items()):
            if i < num_actors:
                self.deploy(actor)
            elif address in self.deployed:
                self.deployed.discard(address)
                actor.drain(1.0)

    def deploy(self, actor: SimActor) -> None:
        self.deployed.add(actor.address)
        actor.restart()

    def repair_dns(self) -> None:
        self.dns_works = True

    def end_learner(self, *, at_once: bool) -> None:
        """A learner that is killed says nothing any more; one that is stopped takes its leave."""
        if self._learner is not None and self._learner_task is not None:
            self._learner.dead = at_once
            self._learner_task.cancel()

    def replace_learner(self, for_s: float) -> None:
        """The next one begins now; the one before it is killed after `for_s`."""
        old, task = self._learner, self._learner_task
        if old is None or task is None or task.done():
            return
        self._num_replaced += 1

        def kill() -> None:
            old.dead = True
            task.cancel()
            self.later(1.0, self._restart_taken)

        self._begin_learner()
        self.later(for_s, kill)

    def _restart_taken(self) -> None:
        """An actor that came up between the two may have followed the new one first, and then the old one: it follows
        the new one again only as another process, which somebody has to see to."""
        for actor in self.actors.values():
            if actor.up and self._learner is not None and self._learner.run_id in actor.policy._retired_runs:
                actor.kill()
                actor.restart()

    def checkpoint(self, learner: SimLearner) -> None:
        if learner is not self._learner:  # the run folder is the new one's
            return
        self._checkpoint = (learner.version, learner.ledger.to_dict(), [*self._timeline, *learner.trained])

    # ---------------------------------------------------------------------------------------------- invariants

    def check(self, holds: bool, message: str) -> None:
        """Note the first thing that is wrong; it ends the schedule."""
        if not holds and self._broken is None:
            self._broken = Broken(f"at {self._loop.now:.3f} s: {message}")
            if self._learner_task is not None:
                self._learner_task.cancel()

    def sampled(self, completions: Sequence[Completion], runs: AbstractSet[int]) -> None:
        """An actor has really sampled these, with weights of these runs."""
        for completion in completions:
            self.check(completion.trajectory_id not in self._sampled, f"{completion.trajectory_id} was sampled twice")
            self._sampled[completion.trajectory_id] = runs

    def has_finished_groups(self) -> bool:
        """Whether the learner of now has seen of late what its actors take."""
        return self._learner is not None and self._loop.now - self._learner.fleet._finished_at < 590.0

    def check_commit(self, learner: SimLearner, actor_id: str, version: int) -> None:
        policy, engine = self.processes[actor_id]
        if self._num_replaced and policy.run_id != learner.run_id:
            return  # another one has taken the actor over while the answer was on its way; the next poll says so
        is_true = (policy.run_id, policy.policy_version) == (learner.run_id, version)
        says = f"{actor_id}: {policy.state.value} run {policy.run_id} version {policy.policy_version} {engine.policy}"
        self.check(is_true and engine.policy == Policy(learner.number, version), f"committed {version}, but {says}")

    def check_batch(self, learner: SimLearner, groups: Sequence[Group]) -> None:
        self.check(len(groups) == self.plan.batch, f"a batch of {len(groups)}")
        for group in groups:
            row = learner.ledger.row(group.sequence)
            where = f"group {group.group_id} of sequence {group.sequence}"
            self.check(group.sample.messages[0].parts == (TextPart(f"row {row}"),), f"{where} is not of row {row}")
            staleness = learner.version - group.oldest_version
            self.check(0 <= staleness <= self.plan.max_staleness, f"{where} is {staleness} versions old")
            self.check([c.index for c in group.completions] == [*range(self.plan.n)], f"{where} is not whole")
            for completion in group.completions:
                name = completion.trajectory_id
                runs = self._sampled.get(name)
                self.check(runs == {learner.number}, f"{where}: {name} was sampled by weights of {runs}")
                self.check(name.rpartition("/")[2] == group.prompt.actor_id, f"{where} is of several actors")
                self.check(name not in self._used, f"{where}: {name} is trained twice")
                self._used.add(name)

    def all_serve(self, learner: SimLearner) -> bool:
        """Every actor serves the newest version, and the fleet knows it."""
        known = {member.actor_id: member for member in learner.fleet.live()}
        return all(
            (member := known.get(actor.actor_id)) is not None
            and (member.version, member.state) == (learner.version, ActorState.SERVING)
            and actor.engine.policy == Policy(learner.number, learner.version)
            for actor in self.actors.values()
            if actor.address in self.deployed
        )

    def check_end(self) -> Result:
        """The books of the whole run."""
        learner = self._learner
        assert learner is not None
        dropped = [sequence for sequences in learner.ledger.dropped.values() for sequence in sequences]
        ended = sorted([*self.timeline, *dropped])
        self._now(ended == [*range(len(ended))], f"sequence numbers lost or doubled: {ended}")
        self._now(len(self.timeline) == self.plan.total_steps * self.plan.batch, f"{len(self.timeline)} trained")
        self._now(TooLarge.reason not in self.dropped, "groups were dropped that only some actors refuse")
        self._now(not learner.ledger.in_flight, f"in flight at the end: {learner.ledger.in_flight}")
        self._now(all(m.in_flight == 0 for m in learner.fleet.members()), "a slot is still held")
        gc.collect(0)
        self._now(not self._loop.errors, f"unseen: {self._loop.errors[:1]}")
        left = [task for task in asyncio.all_tasks(self._loop) if not task.done()]
        self._now(not left, f"tasks left: {left[:1]}")
        return Result(
            virtual_s=self._loop.now,
            faults=self.plan.faults,
            num_trained=len(self.timeline),
            dropped=self.dropped,
            retries=Counter(learner.dispatcher.stats().retries),
            refused=self.refused,
            longest_gap_s=learner.longest_gap_s,
        )

    def _now(self, holds: bool, message: str) -> None:
        if not holds:
            raise Broken(message)
