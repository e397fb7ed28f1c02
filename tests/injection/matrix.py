"""The fault matrix: each phase of an update x each kind of fault x each victim, and how long the others wait for it."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tests.injection.fault import Kind, Phase
from tests.injection.job import Job
from tests.injection.machines import Machine

Victim = Literal["actor", "rank-0", "rank-1"]

# The learner ends by itself: the watch of the ranks (30 s), then torchrun's grace for ranks that do not end (30 s).
_END_S = 100.0
# A deadline of the weights (30 s) may have to pass, more than once.
_RELEASE_S = 150.0
# How long a link of the learner stays slow: longer than the learner waits for an update.
_SLOW_S = 40.0

_TRAINS = "it trains meanwhile: see between"


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault."""

    victim: Victim
    phase: Phase
    kind: Kind

    @property
    def num_nodes(self) -> int:
        """Of the learner: only ranks on machines of their own can be cut off from each other."""
        return 2 if self.victim != "actor" and self.kind in ("cut", "slow") else 1

    @property
    def rank(self) -> str | None:
        """Of the victim; None: an actor."""
        return self.victim[-1] if self.victim != "actor" else None

    def __str__(self) -> str:
        return f"{self.victim}/{self.phase}/{self.kind}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds from the fault.

    `released_s`: until the others went on, the first update or step without the victim. `noticed_s`: until the fleet
    had dropped the actor, or the learner had ended. `back_s`: from the victim's return until all had the newest
    version. `parity_max_abs_diff`: of what was sampled after that.
    """

    cell: Cell
    released_s: float
    noticed_s: float | None
    back_s: float
    parity_max_abs_diff: float | None = None


def absent(victim: Victim, phase: Phase, kind: Kind) -> str:
    """Why there is no such cell; empty if there is one."""
    if victim == "actor" and phase == "gather":
        return "it generates meanwhile: see between"
    if victim == "rank-1" and phase in ("open", "stage", "commit"):
        return _TRAINS
    if kind == "corrupt" and (phase != "stage" or victim == "rank-1"):
        return "no bucket is under way"
    return ""


def cells() -> Iterator[Cell]:
    """All that there are, in the order of the table."""
    for victim, phase, kind in itertools.product(get_args(Victim), get_args(Phase), get_args(Kind)):
        if not absent(victim, phase, kind):
            yield Cell(victim, phase, kind)


def run(job: Job, cell: Cell) -> Outcome:
    """Have it happen to a job that is well, and wait until it is well again. Raises TimeoutError if it never is."""
    outcome = _recovers(job, cell)
    return replace(outcome, parity_max_abs_diff=job.until_compared()) if job.setup.has_parity else outcome


def _recovers(job: Job, cell: Cell) -> Outcome:
    if job.num_nodes != cell.num_nodes:
        job.stop_learner()
        job.start_learner(cell.num_nodes)
    job.until_whole()
    victim = job.actors[1] if cell.rank is None else job.node_of(int(cell.rank))
    victim.arm(cell.kind, cell.phase, job.newest() + 2, cell.rank)
    if cell.phase == "open":  # an actor that goes has the others meet again
        job.actors[0].kill()
        job.start_actor(job.actors[0])
    at = job.until(lambda: victim.happened_at(cell.rank), job.setup.start_s, f"{cell} happens")
    if cell.rank is None:
        return _actor_recovers(job, cell, victim, at)
    if cell.kind in ("slow", "corrupt"):
        return _learner_goes_on(job, cell, victim, at)
    return _learner_resumes(job, cell, victim, at)


def _actor_recovers(job: Job, cell: Cell, victim: Machine, at: float) -> Outcome:
    released = job.until(lambda: job.published(at), _RELEASE_S, f"an update after {cell}")[0].at - at
    job.until(lambda: job.steps_at(at + released), 60, f"a step after {cell}")
    noticed = None
    is_apart = job.setup.is_apart and cell.phase in ("open", "stage")
    if cell.kind in ("kill", "cut") or (cell.kind == "stop" and not is_apart):
        noticed = job.until(lambda: job.left_at(victim, at), 30, "the fleet drops the actor")[0] - at
    if cell.kind == "kill":
        victim.kill()
        job.start_actor(victim)
    back_from = time.time()
    victim.heal()
    return Outcome(cell, released, noticed, job.until_whole() - back_from)


def _learner_goes_on(job: Job, cell: Cell, victim: Machine, at: float) -> Outcome:
    if cell.kind == "slow":
        time.sleep(max(0.0, at + _SLOW_S - time.time()))
    victim.heal()
    back_from = time.time()
    back = job.until_whole(_RELEASE_S) - back_from
    assert not job.learner_ended, f"the learner has ended after {cell}"
    return Outcome(cell, job.published(at)[0].at - at, None, back)


def _learner_resumes(job: Job, cell: Cell, victim: Machine, at: float) -> Outcome:
    job.until(lambda: job.learner_ended, _END_S, f"the learner ends by itself after {cell}")
    noticed = time.time() - at
    victim.heal()
    assert not any(actor.ended for actor in job.actors), "an actor has ended with the learner"
    restarted_at = time.time()
    for node in job.nodes:
        node.kill()
    job.start_learner(cell.num_nodes)
    released = job.until(lambda: job.steps_at(restarted_at), job.setup.start_s, f"a step after {cell}")[0] - at
    return Outcome(cell, released, noticed, job.until_whole() - restarted_at)
