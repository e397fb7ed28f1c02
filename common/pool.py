"""Several actors as one, for callers without a fleet: retries on another actor, one deadline, hedging if asked for.

    generate --> the least busy actor --fails--> the next one ... --none left--> a pause, and all of them again
        +------> (hedging) no answer yet: the same from another actor on; the first answer wins, the other is cancelled

An answer is one call's, whole: what other calls had sent of the group is thrown away, so no trajectory counts twice.
The learner has `learner.rollouts` instead, which knows states and versions.
"""

import asyncio
import collections
from collections.abc import Iterable, Sequence

from common.client import ActorClient, SampledGroup
from common.errors import (
    DeadlineExceeded,
    InvalidRequest,
    OutriderError,
    PermissionDenied,
    QueueFull,
    TooLarge,
    Unimplemented,
)
from common.types import RolloutRequest

# The request itself is at fault: every actor would answer the same.
_HOPELESS = (InvalidRequest, PermissionDenied, TooLarge, Unimplemented)
_PAUSE_S = 0.2


class RolloutPool:
    """Belongs to one event loop, as the clients do, which their owner closes.

    Args:
        clients: one for each actor.
        hedge_after_s: ask another actor when none has answered for so long. None: never. It may cost the work twice;
            of use where the time of one group matters more than how many the actors finish.
        max_failures: calls that may fail before the last error is raised; an actor that is only full does not count.
    """

    def __init__(
        self, clients: Sequence[ActorClient], *, hedge_after_s: float | None = None, max_failures: int = 4
    ) -> None:
        if not clients:
            raise ValueError("clients: is empty; give at least one")
        self._clients = tuple(clients)
        self._hedge_after_s = hedge_after_s
        self._max_failures = max_failures
        self._in_flight: collections.Counter[ActorClient] = collections.Counter()

    async def generate(self, request: RolloutRequest, *, timeout_s: float) -> SampledGroup:
        """Sample a group on some actor, within `timeout_s` in all.

        Raises OutriderError: the last one that came, or DeadlineExceeded, which tells that one's words.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        asked: set[ActorClient] = set()
        said: list[OutriderError] = []
        tries = {asyncio.create_task(self._try_each(request, deadline, asked, said))}
        try:
            async with asyncio.timeout_at(deadline):
                if self._hedge_after_s is not None and len(self._clients) > 1:
                    done, _ = await asyncio.wait(tries, timeout=self._hedge_after_s)
                    if not done:
                        tries.add(asyncio.create_task(self._try_each(request, deadline, asked, said)))
                return await _first_answer(tries)
        except TimeoutError:
            words = f"; the last one that failed: {said[-1]}" if said else ""
            raise DeadlineExceeded(f"no actor answered within {timeout_s:g} s{words}") from None
        finally:
            for task in tries:
                task.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    async def _try_each(
        self, request: RolloutRequest, deadline: float, asked: set[ActorClient], said: list[OutriderError]
    ) -> SampledGroup:
        """One actor after the other. `asked` is shared by all who try for this group: they never meet on one. So is
        `said`, what those that failed have answered.
        """
        clock = asyncio.get_running_loop().time
        num_failures = 0
        again_at: dict[ActorClient, float] = {}  # those that failed here may have recovered by then
        while True:
            free = [client for client in self._clients if client not in asked]
            if not free:
                await asyncio.sleep(min(again_at.values(), default=clock() + _PAUSE_S) - clock())
                for client in [client for client, at in again_at.items() if at <= clock()]:
                    del again_at[client]
                    asked.remove(client)
                continue
            client = min(free, key=lambda client: self._in_flight[client])
            asked.add(client)
            self._in_flight[client] += 1
            pause_s = _PAUSE_S
            try:
                left_s = deadline - clock()
                return await client.generate(request, timeout_s=max(0.0, left_s))
            except _HOPELESS:
                raise
            except QueueFull as error:
                said.append(error)
                pause_s = max(error.retry_after_s, _PAUSE_S)
            except OutriderError as error:
                said.append(error)
                num_failures += 1
                if num_failures >= self._max_failures:
                    raise
            finally:
                self._in_flight[client] -= 1
            again_at[client] = clock() + pause_s


async def _first_answer(tries: Iterable[asyncio.Task[SampledGroup]]) -> SampledGroup:
    """The first result; an error only if nobody has one."""
    waiting = set(tries)
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        # Both in one wake-up of the loop: the answer first.
        for task in sorted(done, key=lambda task: task.exception() is not None):
            if task.exception() is None or not waiting or isinstance(task.exception(), _HOPELESS):
                return task.result()
