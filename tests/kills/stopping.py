"""One actor is stopped for good: what the others get done then, against what they got done before it came."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from learner.types import Group
from tests.kills.actors import Actor
from tests.kills.books import Broken

# Steps: until all is in its stride, of each of the two measurements, and for the one more to come and take its part.
_START, _MEASURED, _JOIN = 3, 20, 8
NUM_STEPS = _START + _MEASURED + _JOIN + _MEASURED


class Stopping:
    """A `Trouble` (tests/kills/run.py): all actors but the last, then all, then the last one gets SIGSTOP."""

    def __init__(self, actors: Sequence[Actor]) -> None:
        self.alone_per_s = self.after_stop_per_s = 0.0
        """Groups of the others, before the last one came and from the moment in which it is stopped."""
        self._others, self._last = actors[:-1], actors[-1]
        self._num_steps = 0
        self._ids: set[str] = set()
        """Of the others."""
        self._began_at = 0.0
        self._num_groups = 0

    def __enter__(self) -> Self:
        for actor in self._others:
            actor.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        pass

    def told(self) -> str:
        """See `Trouble.told`."""
        if not self.after_stop_per_s:
            return f"step {self._num_steps} of {NUM_STEPS}"
        share = self.after_stop_per_s / self.alone_per_s
        return f"1 of {len(self._others) + 1} actors stopped, throughput {share:.3f} of that of {len(self._others)}"

    def step(self, groups: Sequence[Group]) -> None:
        """See `Trouble.step`."""
        self._num_steps += 1
        ids = {group.prompt.actor_id for group in groups}
        if self._num_steps <= _START + _MEASURED:
            self._ids |= ids
        self._num_groups += sum(group.prompt.actor_id in self._ids for group in groups)
        if self._num_steps == _START:
            self._begin()
        elif self._num_steps == _START + _MEASURED:
            self.alone_per_s = self._per_s()
            self._last.start()
        elif self._num_steps == NUM_STEPS - _MEASURED:
            if ids == self._ids:
                raise Broken("the last actor has no part in the step before it is stopped")
            self._last.stop()
            self._begin()
        elif self._num_steps == NUM_STEPS:
            self.after_stop_per_s = self._per_s()

    def _begin(self) -> None:
        self._began_at, self._num_groups = time.monotonic(), 0

    def _per_s(self) -> float:
        return self._num_groups / (time.monotonic() - self._began_at)
