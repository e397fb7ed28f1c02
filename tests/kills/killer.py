"""One actor after the other gets SIGKILL, and comes back a little later at its address."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from learner.types import Group
from tests.kills.actors import Actor

# How long an actor is away: not at all, for less than a poll of the fleet, for longer.
_AWAY_S = (0.0, 0.1, 0.5, 1.0)


class Killer:
    """Kills one actor for each step until there were `num_kills`. Who, when and for how long is a matter of `seed`.

    Used as a context: at its end all actors are back.
    """

    def __init__(self, actors: Sequence[Actor], num_kills: int, *, within_s: float, seed: int) -> None:
        """`within_s`: an actor dies so long after `step` at most."""
        self.num_begun = 0
        self._actors = actors
        self._num_kills = num_kills
        self._within_s = within_s
        self._rng = random.Random(seed)
        self._under_way: dict[Actor, Future[None]] = {}
        self._threads = ThreadPoolExecutor(len(actors), thread_name_prefix="kill")

    def __enter__(self) -> Self:
        for actor in self._actors:
            actor.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._threads.shutdown()
        if error is None:
            self._look_at({*self._under_way.values()})

    def step(self, _groups: Sequence[Group]) -> None:
        """The next step begins. Raises ActorEnded if one was to be killed that had ended already."""
        self._look_at({future for future in self._under_way.values() if future.done()})
        if self.num_begun == self._num_kills:
            return
        if len(self._under_way) == len(self._actors):
            self._look_at(wait(self._under_way.values(), return_when=FIRST_COMPLETED).done)
        victim = self._rng.choice([actor for actor in self._actors if actor not in self._under_way])
        times = self._rng.random() * self._within_s, self._rng.choice(_AWAY_S)
        self._under_way[victim] = self._threads.submit(_kill, victim, *times)
        self.num_begun += 1

    def told(self) -> str:
        """See `Trouble.told`."""
        return f"{self.num_begun} of {self._num_kills} kills"

    def _look_at(self, done: set[Future[None]]) -> None:
        self._under_way = {actor: future for actor, future in self._under_way.items() if future not in done}
        for future in done:
            future.result()


def _kill(actor: Actor, in_s: float, away_s: float) -> None:
    time.sleep(in_s)
    actor.kill()
    time.sleep(away_s)
    actor.start()
