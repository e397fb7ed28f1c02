"""What the fleet knows of one actor, and what it tells others about it."""

import asyncio
import math
from dataclasses import dataclass, field
from typing import Literal

from common.client import ActorClient
from common.types import ActorState, ActorStatus

LAST_WORDS_S = 1.0
"""A busy learner may see that an actor is gone before it has read what that one sent last."""


@dataclass(eq=False, slots=True)
class Member:
    """One incarnation of an actor, or an address that nobody answers at. Changed by the fleet only."""

    address: str
    client: ActorClient
    slots: int
    actor_id: str = ""
    state: ActorState | None = None
    """None: unreachable."""
    version: int = -1
    """Policy version that it serves for this run; -1 for none of ours."""
    status: ActorStatus | None = None
    in_flight: int = 0
    """Groups that it works on for this learner."""
    reason: str = "not reached yet"
    """Why it is unreachable; empty when it is not."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when this incarnation is gone; its groups will never be finished."""
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the calls under way to it are given up: it left, hangs, or is another run's by now.
    Later calls have another one."""
    updated: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has gone over to another policy version; later calls have another one."""
    held: bool = False
    """A call to it has just failed: it gets nothing new until it has answered a poll after `rests_until`."""
    num_failures: int = 0
    """Times that it was held since it last finished a group."""
    rests_until: float = 0.0
    """Time of the event loop."""
    busy: bool = False
    """Its queue is full: it gets no group until the time that it asked for has passed."""
    group_s: float = 0.0
    """Mean seconds of its groups, the newest counting most; 0 before the first."""
    busy_since: float = 0.0
    """Time of the event loop at which it got a group when it had none."""
    progressed_at: float = -math.inf
    """Time of the event loop at which something of a group last came from it."""
    marks: int = 0
    """Counts what the publisher reported; a poll that began before is older news."""

    @property
    def reachable(self) -> bool:
        """Whether it answers."""
        return self.state is not None

    @property
    def has_finished(self) -> bool:
        """Whether it has finished a group: it takes such as ours."""
        return self.group_s > 0


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """What happened to an actor, and why.

    | kind | |
    |---|---|
    | `unreachable` | nobody has answered at this address yet; said once |
    | `joined`, `left` | an incarnation answers, or does not any more |
    | `state` | it changed its state |
    | `held`, `recovered` | it gets no groups after a failed call, or gets them again |
    | `forgotten` | its address is gone from DNS |
    """

    kind: Literal["joined", "left", "state", "held", "recovered", "unreachable", "forgotten"]
    address: str
    actor_id: str
    state: ActorState | None
    reason: str = ""
