"""Finished groups between the dispatcher (asyncio) and the trainer's feed (a thread that blocks).

The feed takes whole batches. A group of which a larger share of tokens than `max_stale_share` (by default: any) is
more than `max_staleness` versions behind is never trained: it leaves the buffer when the feed comes for it and goes
back to the dispatcher, which counts it and samples the prompt again.
"""

import bisect
import threading
from collections.abc import Callable, Sequence

from learner.types import Group


def _accept(_groups: Sequence[Group]) -> bool:
    """Whatever there is."""
    return True


class BufferClosed(RuntimeError):  # noqa: N818 - a state, not a mistake
    """The run is ending; no batch will come."""


class GroupBuffer:
    """A bounded set of finished groups. Thread-safe.

    The credit rule of `learner.rollouts.credits` keeps it within `max_groups`; more is a bug and raises `ValueError`.
    """

    def __init__(self, max_groups: int, *, max_stale_share: float = 0.0) -> None:
        self.max_groups = max_groups
        self._max_stale_share = max_stale_share
        self.on_stale: Callable[[list[Group]], None] | None = None
        """Called, on the thread that takes, with the groups that `take` found too stale."""
        self._groups: dict[int, Group] = {}
        self._order: list[tuple[int, int]] = []  # oldest version and sequence number of each, sorted
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, group: Group) -> None:
        """Add a finished group. Never blocks; raises `ValueError` for a second group of one sequence number."""
        place = (group.oldest_version, group.sequence)
        with self._changed:
            if group.sequence in self._groups:
                raise ValueError(f"sequence {group.sequence} is in the buffer already")
            if len(self._groups) >= self.max_groups:
                raise ValueError(f"the buffer holds {self.max_groups} groups already; the credit rule was broken")
            self._groups[group.sequence] = group
            bisect.insort(self._order, place)
            self._changed.notify_all()

    def take(
        self,
        batch: int,
        *,
        version: int,
        max_staleness: int,
        timeout_s: float | None = None,
        accept: Callable[[Sequence[Group]], bool] = _accept,
    ) -> list[Group]:
        """Wait for `batch` groups that may be trained at `version`; those of the oldest policy first.

        Returns them sorted by sequence number. `accept` may refuse them: it is asked again whenever another group
        comes, and by `look_again`. Raises what `fail` was given, `BufferClosed` after `close`, and `TimeoutError` if
        `timeout_s` passes.
        """
        while True:
            with self._changed:
                # Wakes for stale groups too: they must go back before a batch can become full.
                ready = self._changed.wait_for(
                    lambda: (
                        self._error is not None or self._stale(version, max_staleness) or self._oldest(batch, accept)
                    ),
                    timeout_s,
                )
                if self._error is not None:
                    raise self._error
                if not ready:
                    raise TimeoutError(f"{len(self._groups)} of {batch} groups after {timeout_s} s")
                stale = self._stale(version, max_staleness)
                self._remove(stale)
                taken = self._oldest(batch, accept)
                self._remove(taken)
            if stale and self.on_stale is not None:
                self.on_stale(stale)
            if taken:
                return sorted(taken, key=lambda g: g.sequence)

    def look_again(self) -> None:
        """Whoever waits in `take` asks its `accept` again."""
        with self._changed:
            self._changed.notify_all()

    def _oldest(self, batch: int, accept: Callable[[Sequence[Group]], bool]) -> list[Group]:
        """As many groups, of the oldest policy; none if they are too few, or refused."""
        if len(self._groups) < batch:
            return []
        groups = [self._groups[sequence] for _, sequence in self._order[:batch]]
        return groups if accept(groups) else []

    def _stale(self, version: int, max_staleness: int) -> list[Group]:
        oldest = version - max_staleness
        # Called for each group that comes: only those with anything too old are looked at.
        old = (self._groups[sequence] for _, sequence in self._order[: bisect.bisect_left(self._order, (oldest,))])
        return [group for group in old if group.stale_share(oldest) > self._max_stale_share]

    def _remove(self, groups: list[Group]) -> None:
        for group in groups:
            del self._groups[group.sequence]
        if groups:
            self._order = [place for place in self._order if place[1] in self._groups]

    def fail(self, error: BaseException) -> None:
        """Make every `take`, now and later, raise `error`. The first error stays."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Wake the trainer with `BufferClosed`."""
        self.fail(BufferClosed("the rollouts were stopped"))

    def __len__(self) -> int:
        with self._changed:
            return len(self._groups)
