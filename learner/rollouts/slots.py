"""Slots of actors, and the groups that wait for one: first come, first served among those whom an actor can serve.

A waiter is held against all actors when it comes, and an actor against all waiters when it may have become able to take
more (`offer`): it finished a group, serves a newer version, answers again. Between the two nothing has to be looked at,
so that a large fleet costs a group no more than the choice of its actor.

Offers are taken up together, at the loop's next turn: actors that an update has brought to a version share what waited
for it. Otherwise the first one would get all of it.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from learner.rollouts.members import Member
from learner.rollouts.scheduling import choose, has_slot


@dataclass(eq=False, slots=True)
class _Waiter:
    min_version: Callable[[], int]
    avoid: AbstractSet[str]
    media: Sequence[bytes]
    future: asyncio.Future[tuple[Member, asyncio.Event]]
    """With what interrupts calls to it from then on."""

    def fit(self, free: Iterable[Member]) -> list[Member]:
        """The members that serve a version new enough. -1, which is no version of this run, never is."""
        minimum = max(0, self.min_version())
        return [member for member in free if member.version >= minimum]


class Slots:
    """Belongs to one event loop. `members` gives all that may be chosen from, those that cannot be used too."""

    def __init__(self, members: Callable[[], Iterable[Member]]) -> None:
        self._members = members
        self._waiters: collections.deque[_Waiter] = collections.deque()
        self._offered: dict[Member, None] = {}  # in this turn of the loop, in order

    @contextlib.asynccontextmanager
    async def hold(
        self, min_version: Callable[[], int], avoid: AbstractSet[str], media: Sequence[bytes]
    ) -> AsyncIterator[Member]:
        """See `Fleet.slot`."""
        while True:
            member, interrupted = await self._next(min_version, avoid, media)
            if member.interrupted is interrupted:
                break
            self._release(member)  # before this task's turn it has gone, or hangs: no call to it would notice
        try:
            yield member
        finally:
            self._release(member)

    async def _next(
        self, min_version: Callable[[], int], avoid: AbstractSet[str], media: Sequence[bytes]
    ) -> tuple[Member, asyncio.Event]:
        waiter = _Waiter(min_version, avoid, media, asyncio.get_running_loop().create_future())
        self._take_up()
        # Whoever waits still cannot be served by those that are free now.
        if fit := waiter.fit(member for member in self._members() if has_slot(member)):
            self._give(choose(fit, avoid=avoid, media=media), waiter)
        else:
            self._waiters.append(waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif waiter.future.done() and not waiter.future.cancelled():
                self._release(waiter.future.result()[0])
            raise

    def offer(self, member: Member) -> None:
        """It may be able to take more than before."""
        if not self._offered:
            asyncio.get_running_loop().call_soon(self._take_up)
        self._offered[member] = None

    def _take_up(self) -> None:
        """Give the slots of those who were offered to those who wait."""
        free, self._offered = [member for member in self._offered if has_slot(member)], {}
        passed_over: list[_Waiter] = []
        while self._waiters and free:
            waiter = self._waiters.popleft()
            if waiter.future.done():
                continue
            if fit := waiter.fit(free):
                member = choose(fit, avoid=waiter.avoid, media=waiter.media)
                self._give(member, waiter)
                if not has_slot(member):
                    free.remove(member)
            else:
                passed_over.append(waiter)
        self._waiters.extendleft(reversed(passed_over))

    def close(self) -> None:
        """Nobody gets one any more."""
        for waiter in self._waiters:
            waiter.future.cancel()

    def _release(self, member: Member) -> None:
        member.in_flight -= 1
        self.offer(member)

    def _give(self, member: Member, waiter: _Waiter) -> None:
        if not member.in_flight:
            member.busy_since = asyncio.get_running_loop().time()
        member.in_flight += 1
        waiter.future.set_result((member, member.interrupted))
