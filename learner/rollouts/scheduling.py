"""Who gets the next group, and who is taken for hung. All rules of it are here.

    the least load first;   load = (groups in flight + 1) * pace - 2 if it holds the group's images

| rule | |
|---|---|
| a slow actor is given less | pace: seconds of its groups / seconds of the fastest actor's, at most 4 |
| affinity | an actor that holds the images of a group may have two groups more than another |
| elsewhere, after a failure | actors on which this group has failed come last |
| probation | an actor whose last group failed gets one at a time, until it has finished one |
| hung | groups wait on it, nothing came of any of them for `hung_s`, and another actor did get on meanwhile |
"""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import grpc

from common.errors import OutriderError
from common.types import ActorState
from learner.rollouts.members import Member

# Groups that an actor may be ahead of the least loaded one if it need not be sent the images.
_AFFINITY_GROUPS = 2
# Ratios below are noise; above, the actor would get nothing any more and never show that it has recovered.
_SLOW, _SLOWEST = 1.5, 4.0
# Weight of the newest group in the mean of an actor's seconds.
_NEWEST = 0.2


class ActorHung(OutriderError):  # noqa: N818 - as its kin in common.errors
    """The actor answers, but finishes nothing."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "HUNG"


def has_slot(member: Member) -> bool:
    """Whether it may be given a group now."""
    is_willing = member.state is ActorState.SERVING and not member.held and not member.busy
    return is_willing and member.in_flight < (1 if member.num_failures else member.slots)


def choose(members: Sequence[Member], *, avoid: AbstractSet[str] = frozenset(), media: Sequence[bytes] = ()) -> Member:
    """One of `members`, which all have a slot, for a group with these images that failed on the actors of `avoid`."""
    fastest_s = min((member.group_s for member in members if member.group_s), default=0.0)

    def order(member: Member) -> tuple[bool, float]:
        load = (member.in_flight + 1) * _pace(member, fastest_s)
        if media and member.client.holds(media):
            load -= _AFFINITY_GROUPS
        return member.actor_id in avoid, load

    return min(members, key=order)


def _pace(member: Member, fastest_s: float) -> float:
    ratio = member.group_s / fastest_s if fastest_s else 1.0
    return min(ratio, _SLOWEST) if ratio >= _SLOW else 1.0


def finished(member: Member, seconds: float) -> None:
    """It finished a group in so many seconds."""
    member.num_failures = 0
    member.group_s += (seconds - member.group_s) * (_NEWEST if member.group_s else 1.0)


def is_hung(member: Member, others: Iterable[Member], now: float, hung_s: float) -> bool:
    """Whether to give up what runs there. An actor without others to compare with is only slow."""
    waiting_s = now - max(member.busy_since, member.progressed_at)
    if not member.in_flight or member.held or waiting_s <= hung_s:
        return False
    return any(other is not member and now - other.progressed_at <= hung_s for other in others)
