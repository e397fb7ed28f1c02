"""What happens to the actors step by step: a rolling restart, a fleet that is scaled up and down."""

import abc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self
from unittest import mock

from common.rpc.server import split_address
from learner.rollouts import discovery
from learner.types import Group
from tests.kills.actors import Actor
from tests.kills.books import Broken

# Steps of the learner before something happens.
_PEACE = 4


class Script(abc.ABC):
    """A `Trouble` (tests/kills/run.py) that takes its time, in a thread of its own. The run must outlast it."""

    def __init__(self, actors: Sequence[Actor], num_first: int) -> None:
        """The first `num_first` actors are there from the beginning."""
        self._actors = actors
        self._num_first = num_first
        self._num_steps = 0
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="script")
        self._playing: Future[None] | None = None

    @abc.abstractmethod
    def _play(self) -> None:
        """All of it."""

    @abc.abstractmethod
    def told(self) -> str:
        """See `Trouble.told`."""

    def __enter__(self) -> Self:
        for actor in self._actors[: self._num_first]:
            actor.start()
        self._playing = self._thread.submit(self._play)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.shutdown()
        if error is None and self._playing is not None:
            self._playing.result()

    def step(self, _groups: Sequence[Group]) -> None:
        """See `Trouble.step`."""
        self._num_steps += 1
        if self._playing is not None and self._playing.done():
            self._playing.result()

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for it. Raises Broken if the run ends before."""
        while not condition():
            if self._over.wait(0.05):
                raise Broken(f"the run ended too early: {self.told()}")

    def _steps_pass(self) -> None:
        then = self._num_steps + _PEACE
        self._until(lambda: self._num_steps >= then)


class RollingRestart(Script):
    """Each actor in turn gets SIGTERM, ends, comes back at its address, and serves again; then the next one."""

    def __init__(self, actors: Sequence[Actor]) -> None:
        super().__init__(actors, len(actors))
        self.num_restarted = 0

    def told(self) -> str:
        """See `Trouble.told`."""
        return f"{self.num_restarted} of {len(self._actors)} actors restarted"

    def _play(self) -> None:
        self._steps_pass()
        for actor in self._actors:
            actor.ask_to_end()
            actor.wait()
            actor.start()
            self._until(lambda actor=actor: actor.serves)
            self.num_restarted += 1


class Scaling(Script):
    """A fleet of one size after the other, under a name that has the addresses of those that are meant to be there."""

    def __init__(self, actors: Sequence[Actor], sizes: Sequence[int]) -> None:
        super().__init__(actors, sizes[0])
        self._sizes = sizes
        self._num_meant = sizes[0]
        self._looked_up = ExitStack()

    def told(self) -> str:
        """See `Trouble.told`."""
        return f"{' -> '.join(map(str, self._sizes))} actors, at {self._num_meant}"

    def __enter__(self) -> Self:
        self._looked_up.enter_context(mock.patch.object(discovery, "_ask_resolver", self._resolve))
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._looked_up.close()
        super().__exit__(kind, error, _)

    async def _resolve(self, _name: str, _port: int) -> list[str]:
        return [split_address(actor.address)[0] for actor in self._actors[: self._num_meant]]

    def _play(self) -> None:
        for size in self._sizes[1:]:
            self._steps_pass()
            before, self._num_meant = self._num_meant, size
            come, go = self._actors[before:size], self._actors[size:before]
            for actor in come:
                actor.start()
            for actor in go:
                actor.ask_to_end()
            for actor in go:
                actor.wait()
            self._until(lambda come=come: all(actor.serves for actor in come))
        self._steps_pass()
