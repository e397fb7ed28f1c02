"""Training against actors that are killed, restarted and drained at random turns of the event loop.

Whatever happens, the groups that reach the trainer are those of an undisturbed run: each sequence number once, whole,
of one actor, of the right row, fresh enough. The trainer and the publisher are the test; time plays no part.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from common.types import ActorState, Completion, SamplingParams, TextPart
from learner.data.ledger import Ledger
from learner.rollouts.buffer import GroupBuffer
from learner.rollouts.credits import Credits
from learner.rollouts.dispatcher import Dispatcher
from learner.rollouts.fleet import Fleet
from learner.rollouts.members import FleetEvent
from learner.rollouts.sampler import Sampler
from learner.types import Group
from tests.helpers.fakes import FakeActor, FakeProcessor, InlineRewards, Rows

RUN_ID = "run"
NUM_ROWS = 13
BATCH = 4
N = 3


def reward(*, ground_truth: str, token_ids: list[int], **_: Any) -> float:
    """Tells row and tokens apart; row 5 fails."""
    if ground_truth == "5":
        raise RuntimeError("the judge has no opinion")
    return int(ground_truth) + token_ids[0] / 1000


@dataclass
class Run:
    """One learner: rollouts, a trainer and a publisher on top of fake actors."""

    actors: list[FakeActor]
    ledger: Ledger
    max_staleness: int
    total_steps: int
    version: int = 0
    taken: list[list[Group]] = field(default_factory=list)

    def __post_init__(self) -> None:
        by_address = {actor.address: actor for actor in self.actors}
        self.fleet = Fleet(
            list(by_address), run_id=RUN_ID, connect=lambda a: by_address[a].connect(), slots_per_actor=3, poll_s=0.0005
        )
        self.buffer = GroupBuffer((self.max_staleness + 1) * BATCH)
        self.dispatcher = Dispatcher(
            dataset=Rows(NUM_ROWS),
            ledger=self.ledger,
            processor=FakeProcessor(),
            sampler=Sampler(self.fleet, max_attempts=1000),
            rewards=InlineRewards(reward),
            buffer=self.buffer,
            credits=Credits(BATCH, self.max_staleness, step=self.version, total_steps=self.total_steps),
            sampling=SamplingParams(n=N),
            run_id=RUN_ID,
        )

    def publish(self) -> None:
        """Every actor that answers gets the current weights; a drained one is left alone."""
        for member in self.fleet.live():
            actor = next(actor for actor in self.actors if actor.address == member.address)
            if actor.alive and actor.actor_id == member.actor_id and actor.state is not ActorState.DRAINING:
                actor.run_id, actor.version, actor.state = RUN_ID, self.version, ActorState.SERVING
                self.fleet.mark_committed(member.address, member.actor_id, self.version)

    def _publish_soon(self, event: FleetEvent) -> None:
        asyncio.get_running_loop().call_soon(self.publish)

    async def go(self, until: int) -> None:
        """Train up to `until` steps, then stop the rollouts wherever they are."""
        self.fleet.subscribe(self._publish_soon)
        await self.fleet.start(startup_timeout_s=10, min_actors=1)
        self.publish()
        rollouts = asyncio.create_task(self.dispatcher.run())
        try:
            while self.version < until:
                groups = await asyncio.to_thread(
                    self.buffer.take, BATCH, version=self.version, max_staleness=self.max_staleness, timeout_s=30
                )
                for group in groups:
                    assert 0 <= self.version - group.oldest_version <= self.max_staleness
                self.taken.append(groups)
                self.ledger.mark_trained(group.sequence for group in groups)
                self.version += 1
                self.dispatcher.set_version(self.version)
                self.publish()
        finally:
            rollouts.cancel()
            await asyncio.gather(rollouts, return_exceptions=True)
            await self.fleet.close()


async def chaos(actors: list[FakeActor], rng: random.Random) -> Counter[str]:
    """Kill, restart, drain: until cancelled. At least one actor stays up."""
    done: Counter[str] = Counter()
    try:
        while True:
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            actor = rng.choice(actors)
            up = [a for a in actors if a.alive and a.state is not ActorState.DRAINING]
            if not actor.alive or actor.state is ActorState.DRAINING:
                actor.restart()
                done["restart"] += 1
            elif len(up) > 1:
                if rng.random() < 0.7:
                    actor.kill()
                    done["kill"] += 1
                else:
                    actor.state = ActorState.DRAINING
                    done["drain"] += 1
    except asyncio.CancelledError:
        return done


def expected_reward(row: int, completion: Completion) -> np.float32:
    return np.float32(row + completion.token_ids[0] / 1000)


def check_groups(batches: list[list[Group]], ledger: Ledger) -> list[int]:
    """Whole, of one actor, of the right row, rewarded right, no trajectory twice; the sequence numbers in all."""
    trajectories: set[str] = set()
    sequences = []
    for group in (group for batch in batches for group in batch):
        row = Ledger(ledger.seed, NUM_ROWS).row(group.sequence)
        assert group.sample.messages[0].parts == (TextPart(f"row {row}"),)
        assert bytes((group.prompt.expanded_ids - 2).tolist()) == f"row {row}".encode()
        assert [completion.index for completion in group.completions] == list(range(N))
        names = {completion.trajectory_id for completion in group.completions}
        assert {name.rpartition("/")[2] for name in names} == {group.prompt.actor_id}
        assert all(name.startswith(f"{RUN_ID}.{group.sequence}.") for name in names)
        assert not names & trajectories
        trajectories |= names
        assert group.rewards.tolist() == [expected_reward(row, c) for c in group.completions]
        sequences.append(group.sequence)
    return sequences


def check_ledger(sequences: list[int], ledger: Ledger) -> None:
    """Everything handed out is trained, dropped for the one bad row, or in flight: each exactly once."""
    dropped = ledger.dropped
    assert set(dropped) <= {"REWARD_RAISED"}
    bad = dropped.get("REWARD_RAISED", [])
    assert all(ledger.row(sequence) == 5 for sequence in bad)
    everything = sorted([*sequences, *bad, *ledger.in_flight])
    assert everything == list(range(len(everything)))
    assert ledger.num_trained == len(sequences)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
async def test_kills_at_random_points(seed: int, max_staleness: int) -> None:
    rng = random.Random(seed)
    actors = [FakeActor(f"actor{i}", rng=random.Random(seed + i)) for i in range(3)]
    ledger = Ledger(seed, NUM_ROWS)
    run = Run(actors, ledger, max_staleness, total_steps=25)
    disturbance = asyncio.create_task(chaos(actors, rng))
    await run.go(until=25)
    disturbance.cancel()
    done = await disturbance
    # The faults did happen, and hit groups that were running.
    assert done["kill"] > 3
    assert done["restart"] > 3
    assert sum(run.dispatcher.stats().retries.values()) > 0
    sequences = check_groups(run.taken, ledger)
    assert len(sequences) == 25 * BATCH
    check_ledger(sequences, ledger)
    # The last step was known: nothing is left over.
    assert not ledger.in_flight
    assert run.dispatcher.stats().dropped.get("REWARD_RAISED", 0) == len(ledger.dropped.get("REWARD_RAISED", []))


@pytest.mark.parametrize("seed", range(3))
async def test_a_killed_learner_resumes_and_trains_each_prompt_once(seed: int) -> None:
    actors = [FakeActor(f"actor{i}", rng=random.Random(seed + i)) for i in range(2)]
    ledger = Ledger(seed, NUM_ROWS)
    first = Run(actors, ledger, max_staleness=1, total_steps=20)
    await first.go(until=7)
    assert ledger.in_flight
    resumed = Ledger.from_dict(ledger.to_dict(), seed=seed, num_rows=NUM_ROWS)
    second = Run(actors, resumed, max_staleness=1, total_steps=20, version=7)
    await second.go(until=20)
    # Trajectories of the second incarnation may share names with groups that the first one never trained.
    sequences = check_groups(first.taken, ledger) + check_groups(second.taken, ledger)
    assert len(sequences) == 20 * BATCH
    check_ledger(sequences, resumed)
    assert not resumed.in_flight
