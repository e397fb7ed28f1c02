"""What can befall an actor, the names, or the learner of a schedule, by name. Each ends by itself after `for_s`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.actors import SimActor

if TYPE_CHECKING:
    from tests.simulation.world import World

# Faults may last so much longer than `for_s`.
EXTRA_S = 6.0


def _kill(world: "World", actor: SimActor, for_s: float) -> None:
    actor.kill()
    world.later(for_s, actor.restart)


def _kill_for_long(world: "World", actor: SimActor, for_s: float) -> None:
    _kill(world, actor, for_s + 5)


def _freeze(world: "World", actor: SimActor, for_s: float) -> None:
    actor.freeze()
    world.later(for_s, actor.thaw)


def _cut(world: "World", actor: SimActor, for_s: float) -> None:
    actor.link.block()
    world.later(for_s, actor.link.free)


def _hang(world: "World", actor: SimActor, for_s: float) -> None:
    actor.hang()
    world.later(for_s, actor.work)


def _drain(world: "World", actor: SimActor, for_s: float) -> None:
    actor.drain(min(for_s, 5))


def _busy(world: "World", actor: SimActor, for_s: float) -> None:
    actor.busy = True
    world.later(for_s, actor.not_busy)


def _slow(world: "World", actor: SimActor, for_s: float) -> None:
    actor.slowness *= 4
    world.later(for_s, actor.faster)


def _corrupt(world: "World", actor: SimActor, for_s: float) -> None:
    actor.corrupt_next = True


def _torn_commit(world: "World", actor: SimActor, for_s: float) -> None:
    actor.tear_next_commit()


def _scale(world: "World", actor: SimActor, for_s: float) -> None:
    world.deployed.discard(actor.address)
    actor.drain(min(for_s, 2))
    world.later(for_s, lambda: world.deploy(actor))


def _dns(world: "World", actor: SimActor, for_s: float) -> None:
    world.dns_works = False
    world.later(for_s, world.repair_dns)


def _learner_killed(world: "World", actor: SimActor, for_s: float) -> None:
    world.end_learner(at_once=True)


def _learner_stopped(world: "World", actor: SimActor, for_s: float) -> None:
    world.end_learner(at_once=False)


def _no_rendezvous(world: "World", actor: SimActor, for_s: float) -> None:
    actor.reaches_rendezvous = False
    world.later(for_s, actor.reach_rendezvous)


def _refuses_updates(world: "World", actor: SimActor, for_s: float) -> None:
    """As one with another checkpoint, which answers whoever asks how it is."""
    actor.refuses_updates = True
    world.later(for_s, actor.take_updates)


def _refuses_groups(world: "World", actor: SimActor, for_s: float) -> None:
    """It comes back with smaller limits than the others, until it is set right."""

    def restart(*, is_small: bool) -> None:
        actor.kill()
        actor.refuses_groups = is_small
        actor.restart()

    restart(is_small=True)
    world.later(for_s, lambda: restart(is_small=False))


def _second_learner(world: "World", actor: SimActor, for_s: float) -> None:
    """The next one begins while the one before it goes on, as where that is cut off from who starts learners."""
    world.replace_learner(for_s)


KINDS: dict[str, Callable[["World", SimActor, float], None]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        *(_kill, _kill_for_long, _freeze, _cut, _hang, _drain, _busy, _slow, _corrupt, _torn_commit),
        *(_scale, _dns, _learner_killed, _learner_stopped),
    )
}
# Not drawn, see `make_plan`.
OTHER_KINDS = {
    "no_rendezvous": _no_rendezvous,
    "refuses_updates": _refuses_updates,
    "refuses_groups": _refuses_groups,
    "second_learner": _second_learner,
}
