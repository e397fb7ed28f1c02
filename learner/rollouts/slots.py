"""Slots of actors, and the groups that wait for one: first come, first served among those whom an actor can serve.

A waiter is held against all actors when it comes, and an actor against all waiters when it may have become able to take
more (`offer`): it finished a group, serves a newer version, answers again. Between the two nothing has to be looked at,
so that a large fleet costs a group no more than the choice of its actor.

Groups that an actor has refused are few. They come first, and are held against all actors each time: what they wait for
may also go (`look_again`).

Offers are taken up together, at the loop's next turn: actors that an update has brought to a version share what waited
for it. Otherwise the first one would get all of it.
"""

import asyncio
import collections
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from common.types import ActorState
from learner.rollouts.members import Member
from learner.rollouts.scheduling import choose, has_slot, may_serve_soon, second_opinions

# How long a group that an actor has refused waits where others are there, but do not serve what it needs: those whom
# an update reaches last do so soon; one that takes no update may never.
_PATIENCE_S = 60.0


class NobodyElse(Exception):  # noqa: N818 - says what there is
    """Every actor that serves has refused the group."""


@dataclass(eq=False, slots=True)
class _Waiter:
    min_version: Callable[[], int]
    avoid: AbstractSet[str]
    media: Sequence[bytes]
    refused_by: AbstractSet[Member]
    future: asyncio.Future[tuple[Member, asyncio.Event]]
    """With what interrupts calls to it from then on."""
    waits_until: float = math.inf
    """Time of the event loop; for those who were refused."""

    def fit(self, members: Iterable[Member]) -> list[Member]:
        """The members that serve a version new enough. -1, which is no version of this run, never is."""
        minimum = max(0, self.min_version())
        return [member for member in members if member.version >= minimum]


class Slots:
    """Belongs to one event loop. `members` gives all that may be chosen from, those that cannot be used too."""

    def __init__(self, members: Callable[[], Iterable[Member]]) -> None:
        self._members = members
        self._waiters: collections.deque[_Waiter] = collections.deque()
        self._refused: list[_Waiter] = []
        self._offered: dict[Member, None] = {}  # in this turn of the loop, in order

    @contextlib.asynccontextmanager
    async def hold(
        self,
        min_version: Callable[[], int],
        avoid: AbstractSet[str],
        media: Sequence[bytes],
        refused_by: AbstractSet[Member] = frozenset(),
    ) -> AsyncIterator[Member]:
        """See `Fleet.slot`."""
        while True:
            future = asyncio.get_running_loop().create_future()
            member, interrupted = await self._next(_Waiter(min_version, avoid, media, refused_by, future))
            if member.interrupted is interrupted:
                break
            self._release(member)  # before this task's turn it has gone, or hangs: no call to it would notice
        try:
            yield member
        finally:
            self._release(member)

    async def _next(self, waiter: _Waiter) -> tuple[Member, asyncio.Event]:
        loop = asyncio.get_running_loop()
        patience = None
        if waiter.refused_by:
            waiter.waits_until = loop.time() + _PATIENCE_S
            patience = loop.call_at(waiter.waits_until, self._take_up)
            self._refused.append(waiter)
            self._take_up()
        else:
            self._take_up()
            # Whoever waits still cannot be served by those that are free now.
            if fit := waiter.fit(member for member in self._members() if has_slot(member)):
                self._give_best(fit, waiter)
            else:
                self._waiters.append(waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                self._release(waiter.future.result()[0])
            raise
        finally:
            if patience is not None:
                patience.cancel()

    def offer(self, member: Member) -> None:
        """It may be able to take more than before."""
        if not self._offered:
            asyncio.get_running_loop().call_soon(self._take_up)
        self._offered[member] = None

    def look_again(self) -> None:
        """Somebody may be able to take less than before."""
        if self._refused:
            asyncio.get_running_loop().call_soon(self._take_up)

    def _take_up(self) -> None:
        """Give the slots of those who were offered to those who wait."""
        for waiter in self._refused:
            if not waiter.future.done():
                self._ask_another(waiter)
        self._refused = [waiter for waiter in self._refused if not waiter.future.done()]
        free, self._offered = [member for member in self._offered if has_slot(member)], {}
        passed_over: list[_Waiter] = []
        while self._waiters and free:
            waiter = self._waiters.popleft()
            if waiter.future.done():
                continue
            if fit := waiter.fit(free):
                member = self._give_best(fit, waiter)
                if not has_slot(member):
                    free.remove(member)
            else:
                passed_over.append(waiter)
        self._waiters.extendleft(reversed(passed_over))

    def close(self) -> None:
        """Nobody gets one any more."""
        for waiter in (*self._waiters, *self._refused):
            waiter.future.cancel()

    def _release(self, member: Member) -> None:
        member.in_flight -= 1
        self.offer(member)

    def _ask_another(self, waiter: _Waiter) -> None:
        others = [member for member in self._members() if member not in waiter.refused_by and may_serve_soon(member)]
        serving = waiter.fit(member for member in others if member.state is ActorState.SERVING)
        if free := [member for member in second_opinions(serving) if has_slot(member)]:
            self._give_best(free, waiter)
        elif not others or (not serving and asyncio.get_running_loop().time() >= waiter.waits_until):
            waiter.future.set_exception(NobodyElse())

    def _give_best(self, free: Sequence[Member], waiter: _Waiter) -> Member:
        member = choose(free, avoid=waiter.avoid, media=waiter.media)
        if not member.in_flight:
            member.busy_since = asyncio.get_running_loop().time()
        member.in_flight += 1
        waiter.future.set_result((member, member.interrupted))
        return member
