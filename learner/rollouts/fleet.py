"""The fleet: which actors there are, what each can do now, and who gets the next group.

    discovery -> addresses --poll GetStatus--> members --slot(min_version)--> sampler
                                     |  ^
                              events v  | mark_committed
                            display, publisher

An address that comes up in DNS is polled from then on; one that is gone from there, and does not answer any more, is
forgotten. One `Member` is one incarnation of an actor process. A process that comes back under the same address is
another member: what was known of the old one (weights, stored media, running groups) is void. One that answers at two
addresses is a member at the first of them.

| state of a member | takes groups |
|---|---|
| None: unreachable | no; it is polled until it comes (back) |
| LOADING, PENDING_WEIGHTS, PAUSED, DRAINING, FAILED | no |
| SERVING, committed version >= what the group needs, a free slot | yes, see `learner.rollouts.scheduling` |
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from common.client import ActorClient, GrpcClient
from common.config import ConfigError, NotYet
from common.errors import DeadlineExceeded, Draining, OutriderError, Paused, QueueFull, Unreachable
from common.log import get_logger
from common.types import ActorState, ActorStatus
from learner.rollouts.discovery import Discovery, Resolve
from learner.rollouts.members import LAST_WORDS_S, FleetEvent, Member
from learner.rollouts.scheduling import ActorHung, finished, has_slot, is_hung
from learner.rollouts.slots import Slots

log = get_logger("learner.rollouts.fleet")

# Polls cost the learner time: in a larger fleet each actor is polled less often. Calls under way that break are noticed
# at once all the same.
_AT_FULL_PACE = 64
# A starved actor may answer late once; a second time in a row counts as gone.
_MAX_LATE_POLLS = 2
# How long an actor rests that fails again and again: not at all after the first time, then 0.5 s, 1.5 s, 3.5 s, ...
_FIRST_REST_S = 0.5
_LONGEST_REST_S = 120.0
# How long after the last finished group a newcomer's word does not count yet: long enough for all others to restart.
_BELIEVES_NOBODY_S = 600.0


@dataclass(eq=False, slots=True)
class _Place:
    """One address over time."""

    member: Member
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    late_polls: int = 0
    reported: bool = False
    poll: "asyncio.Task[None] | None" = None


class Fleet:
    """Addresses and the actors behind them. Belongs to one event loop, except where noted.

    Args:
        targets: where actors may be, see `learner.rollouts.discovery`.
        run_id: this learner's. Only what `mark_committed` reports counts as a served version then, so that an actor
            with the weights of another run gets nothing. None: the version that an actor reports is believed, for
            standalone actors.
        connect: makes the client of an address.
        slots_per_actor: groups that one actor works on at once.
        poll_s: pause between two GetStatus calls to one actor; longer in a fleet of more than 64.
        status_timeout_s: deadline of one such call.
        hung_s: an actor with groups of which nothing comes for so long, while others get on, is taken for hung.
        discover_s: pause between two look-ups of names.
        resolve: look-up of a name.
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        run_id: str | None,
        connect: Callable[[str], ActorClient] = GrpcClient,
        slots_per_actor: int = 64,
        poll_s: float = 0.5,
        status_timeout_s: float = 5.0,
        hung_s: float = 100.0,
        discover_s: float = 2.0,
        resolve: Resolve | None = None,
    ) -> None:
        self._targets = tuple(targets)
        self._discovery = Discovery(targets, resolve)
        self._discover_s = discover_s
        self.run_id = run_id
        self._connect = connect
        self._slots_per_actor = slots_per_actor
        self._poll_s = poll_s
        self._status_timeout_s = status_timeout_s
        self._hung_s = hung_s
        self._places: dict[str, _Place] = {}
        self._discovering: asyncio.Task[None] | None = None
        self._forgotten: dict[ActorClient, asyncio.Task[None] | None] = {}
        """Clients that are still to be closed, and who does it."""
        self._slots = Slots(self.live)
        self._callbacks: list[Callable[[FleetEvent], None]] = []
        self._enough = asyncio.Event()
        self._min_actors = 1
        self._finished_at = -math.inf
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()

    async def start(self, *, startup_timeout_s: float, min_actors: int = 1) -> None:
        """Begin to poll; return when `min_actors` answer. The others may come later.

        Raises `NotYet`, one line that says who is missing, if too few answer in time, and as `watch`.
        """
        self._min_actors = min_actors
        for address in self._discovery.fixed:
            self._add(address)
        if self._discovery.changes:
            self._discovering = self._begin(self._discover())
        try:
            async with asyncio.timeout(startup_timeout_s):
                await self._enough.wait()
        except TimeoutError:
            raise NotYet(self._too_few(startup_timeout_s)) from None
        if self._failure is not None:
            raise self._failure

    async def watch(self) -> None:
        """Wait until cancelled. Raises what has ended a poll or the discovery: actors would go unseen from then on."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def close(self) -> None:
        """Stop polling and close every connection."""
        tasks = [place.poll for place in self._places.values() if place.poll is not None]
        tasks += [task for task in (self._discovering, *self._forgotten.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots.close()
        clients = [*(place.member.client for place in self._places.values()), *self._forgotten]
        await asyncio.gather(*(client.close() for client in clients))

    def members(self) -> tuple[Member, ...]:
        """One for each address, reachable or not. May be called from any thread."""
        return tuple(place.member for place in self._places.copy().values())

    def live(self) -> tuple[Member, ...]:
        """Those that answer, in whatever state. May be called from any thread."""
        return tuple(member for member in self.members() if member.reachable)

    def subscribe(self, callback: Callable[[FleetEvent], None]) -> None:
        """Call `callback` with each event, on the loop; it must not block."""
        self._callbacks.append(callback)

    def _too_few(self, after_s: float) -> str:
        silent = [f"{member.address} ({member.reason})" for member in self.members() if not member.reachable]
        answer = [member.address for member in self.live()]
        if answer and not silent:
            return (
                f"after {after_s:g} s there are {len(answer)} of rollout.min_actors={self._min_actors} actors: "
                f"{', '.join(answer)}; start more of them, or wait for fewer"
            )
        return (
            f"no answer within {after_s:g} s from {', '.join(silent or self._targets)}; start `python -m actor "
            "--listen ADDRESS --model DIR` there, or correct the list of actor addresses"
        )

    # ------------------------------------------------------------------------------------------ what others report

    def mark_committed(self, address: str, actor_id: str, version: int) -> None:
        """The publisher: this incarnation now serves `version`. Unknown incarnations are ignored: they are gone."""
        place = self._places.get(address)
        if place is None or place.member.actor_id != actor_id or not place.member.reachable:
            return
        member = place.member
        if member.version != version:
            updated, member.updated = member.updated, asyncio.Event()
            updated.set()
            member.version = version
        member.marks += 1
        if member.state in (ActorState.LOADING, ActorState.PENDING_WEIGHTS):
            self._set_state(member, ActorState.SERVING, f"committed version {version}")
        self._slots.offer(member)

    def report_failure(self, member: Member, error: OutriderError) -> None:
        """A call to `member` failed: it gets nothing new until it has answered a poll, which is made at once.

        Answering polls does not make it well: one that fails again before it has finished a group rests, for longer
        each time, so that an actor that fails fast does not draw all groups to itself.
        """
        if member.left.is_set():
            return
        if isinstance(error, QueueFull):
            member.busy = True
            asyncio.get_running_loop().call_later(max(error.retry_after_s, 0.05), self._not_busy, member)
            return
        if isinstance(error, Paused):
            self._set_state(member, ActorState.PAUSED, "it refused a call")
            return
        if isinstance(error, Draining):
            self._set_state(member, ActorState.DRAINING, "it refused a call")
        if not member.held:
            rest_s = min(_FIRST_REST_S * (2**member.num_failures - 1), _LONGEST_REST_S)
            member.rests_until = asyncio.get_running_loop().time() + rest_s
            member.num_failures += 1
            member.held = True
            self._tell(FleetEvent("held", member.address, member.actor_id, member.state, error.message))
        self._places[member.address].wake.set()

    def report_progress(self, member: Member) -> None:
        """Something of a group came from it."""
        member.progressed_at = asyncio.get_running_loop().time()

    def report_success(self, member: Member, seconds: float) -> None:
        """It finished a group in so many seconds."""
        self._finished_at = asyncio.get_running_loop().time()
        self.report_progress(member)
        finished(member, seconds)

    def believes(self, member: Member) -> bool:
        """Whether a group that it refuses as wrong is wrong.

        The word of one that has finished no group does not count while others do: it may have come with smaller limits
        than they have, or be of another release. Then it is the one that fails.
        """
        return member.has_finished or asyncio.get_running_loop().time() - self._finished_at > _BELIEVES_NOBODY_S

    def _not_busy(self, member: Member) -> None:
        member.busy = False
        self._slots.offer(member)

    def slot(
        self, min_version: Callable[[], int], avoid: AbstractSet[str] = frozenset(), media: Sequence[bytes] = ()
    ) -> AbstractAsyncContextManager[Member]:
        """Wait for a serving actor with a free slot and a version of at least `min_version()`; hold the slot.

        Of those that are free, the incarnations in `avoid` come last, and those that hold `media` are preferred.
        `min_version` never falls.
        """
        return self._slots.hold(min_version, avoid, media)

    # -------------------------------------------------------------------------------------------------- discovery

    def _add(self, address: str) -> None:
        place = self._places[address] = _Place(Member(address, self._connect(address), self._slots_per_actor))
        place.poll = self._begin(self._poll(place))

    def _begin(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """One of the fleet's own tasks. They end when they are cancelled, or with an error."""
        task = asyncio.create_task(coroutine)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._failure = task.exception()
            self._failed.set()
            self._enough.set()  # `start` need not wait any longer

    async def _discover(self) -> None:
        while True:
            addresses = await self._discovery.addresses()
            try:
                for address in addresses:
                    if address not in self._places:
                        self._add(address)
            except ConfigError as error:
                if not self._enough.is_set():
                    raise
                # In the middle of a rotation of certificates, perhaps.
                log.warning("no new actor can be connected to now", error=str(error))
            for address in [*self._places]:
                # Who answers is an actor, whatever DNS says of it.
                if address not in addresses and not self._places[address].member.reachable:
                    await self._forget(address)
            await asyncio.sleep(self._discover_s)

    async def _forget(self, address: str) -> None:
        place = self._places.pop(address)
        self._forgotten[place.member.client] = None
        assert place.poll is not None
        place.poll.cancel()
        await asyncio.gather(place.poll, return_exceptions=True)
        if place.member.reachable:  # it came back in this very moment
            self._leave(place, "its address is gone from DNS")
        self._forgotten[place.member.client] = asyncio.create_task(self._close_later(place.member.client))
        self._tell(FleetEvent("forgotten", address, "", None, "its address is gone from DNS"))

    async def _close_later(self, client: ActorClient) -> None:
        """What it has sent may still be read."""
        await asyncio.sleep(LAST_WORDS_S)
        await client.close()
        del self._forgotten[client]

    # ------------------------------------------------------------------------------------------------------ polls

    async def _poll(self, place: _Place) -> None:
        while True:
            marks = place.member.marks
            place.wake.clear()
            try:
                status = await place.member.client.status(timeout_s=self._status_timeout_s)
            except OutriderError as error:
                self._missed(place, error)
            else:
                self._answered(place, status, is_news=marks == place.member.marks)
            with contextlib.suppress(TimeoutError):
                # Not wait_for: Python 3.11's loses a cancellation that comes together with the event.
                async with asyncio.timeout(self._poll_s * max(1.0, len(self._places) / _AT_FULL_PACE)):
                    await place.wake.wait()

    def _answered(self, place: _Place, status: ActorStatus, *, is_news: bool) -> None:
        place.late_polls = 0
        member = place.member
        if member.reachable and member.actor_id != status.actor_id:
            self._leave(place, "restarted")
        before = has_slot(place.member), place.member.version
        if not place.member.reachable:
            if twin := next((other for other in self.live() if other.actor_id == status.actor_id), None):
                self._missed(place, Unreachable(f"it is the actor that answers at {twin.address}"))
                return
            member = self._join(place, status)
        member.status = status
        if is_news:
            self._set_state(member, status.state, "it says so")
            if self.run_id is None:
                member.version = status.policy_version
            elif status.run_id != self.run_id and member.version >= 0:
                member.version = -1
                self._interrupt(member)  # what comes of its groups is the other run's
        if member.held and asyncio.get_running_loop().time() >= member.rests_until:
            member.held = False
            self._tell(FleetEvent("recovered", member.address, member.actor_id, member.state, "it answers"))
        others = (other.member for other in self._places.values() if other.member.reachable)
        if is_hung(member, others, asyncio.get_running_loop().time(), self._hung_s):
            self._interrupt(member)
            self.report_failure(member, ActorHung(f"nothing came from {member.address} for {self._hung_s:g} s"))
        if before != (has_slot(member), member.version):
            self._slots.offer(member)

    def _missed(self, place: _Place, error: OutriderError) -> None:
        place.late_polls += 1
        if not place.member.reachable:
            place.member.reason = error.message
            if not place.reported:
                self._tell(FleetEvent("unreachable", place.member.address, "", None, error.message))
                place.reported = True
        elif not isinstance(error, DeadlineExceeded) or place.late_polls >= _MAX_LATE_POLLS:
            self._leave(place, error.message)

    def _join(self, place: _Place, status: ActorStatus) -> Member:
        old = place.member
        old.client.forget_media()
        place.member = Member(old.address, old.client, self._slots_per_actor, status.actor_id, reason="")
        place.member.state = status.state
        place.reported = True
        self._tell(FleetEvent("joined", old.address, status.actor_id, status.state))
        if len(self.live()) >= self._min_actors:
            self._enough.set()
        return place.member

    def _leave(self, place: _Place, reason: str) -> None:
        old = place.member
        place.member = Member(old.address, old.client, self._slots_per_actor, reason=reason)
        old.state = None
        old.reason = reason
        old.left.set()
        self._interrupt(old)
        self._tell(FleetEvent("left", old.address, old.actor_id, None, reason))

    def _interrupt(self, member: Member) -> None:
        """Give up the calls under way to it; the sampler sends their groups elsewhere."""
        lost, member.interrupted = member.interrupted, asyncio.Event()
        lost.set()

    def _set_state(self, member: Member, state: ActorState, reason: str) -> None:
        if member.state is not state:
            member.state = state
            self._tell(FleetEvent("state", member.address, member.actor_id, state, reason))

    def _tell(self, event: FleetEvent) -> None:
        """Every transition passes here: into the log, and to those who asked."""
        log.info(
            "actor",
            kind=event.kind,
            address=event.address,
            actor_id=event.actor_id,
            state=event.state.value if event.state is not None else None,
            reason=event.reason,
        )
        for callback in self._callbacks:
            callback(event)
