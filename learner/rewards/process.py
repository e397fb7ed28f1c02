"""One reward process, and another one in its place when it hangs or dies."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from pebble import CONSTS, ProcessExpired, ProcessPool

from learner.rewards import worker
from learner.rewards.base import RewardError
from learner.types import Scores

# A new process imports the user's modules before it takes up a group.
_START_S = 120.0
# Reward processes take no notice of SIGTERM: pebble's SIGKILL comes at once.
CONSTS.term_timeout = 0


class RewardProcess:
    """Scores groups, one at a time.

    It is a pool of one: whatever goes wrong in it is of the group that it was given, and no lock is shared with others.
    It is started as a new program ("spawn"): this process has threads and gRPC, which a fork would break. What a reward
    starts in it is of its process group, and ends with it.

    Args:
        names: of the reward functions; `learner.rewards.load` says what a name is.
        weights: of the functions.
        timeout_s: for one group, from the moment that the process takes it up.
    """

    def __init__(self, names: tuple[str, ...], weights: tuple[float, ...], *, timeout_s: float) -> None:
        self._names = names
        self._weights = weights
        self._timeout_s = timeout_s
        self._pool: ProcessPool | None = None
        self._context = _Groups()
        self._is_closed = False
        self._lock = threading.Lock()  # pools start and end in threads, also when nobody waits for them any more
        self._running()

    async def score(self, pickled: bytes, where: str) -> Scores:
        """The scores of a pickled `ScoringTask`. Raises `RewardError`, with `where` in its message."""
        pool = self._pool
        if pool is None or not pool.active:
            pool = await asyncio.to_thread(self._running)
        limit = asyncio.timeout(_START_S + self._timeout_s)
        has_answered = False
        try:
            async with limit:
                future = pool.schedule(
                    worker.run, args=(self._names, self._weights, pickled, where), timeout=self._timeout_s
                )
                answer = await asyncio.wrap_future(future)
            has_answered = True
        except TimeoutError:
            took = f"{_START_S + self._timeout_s:g} s, start included" if limit.expired() else f"{self._timeout_s:g} s"
            raise RewardError("REWARD_TIMEOUT", f"{where}: no reward within {took}") from None
        except (ProcessExpired, RuntimeError) as error:  # the process died; or pebble's pool did, as it noticed
            code = f"exit code {error.exitcode}" if isinstance(error, ProcessExpired) else str(error)
            raise RewardError("REWARD_CRASHED", f"{where}: the reward's process died ({code})") from error
        finally:
            if not has_answered:
                await asyncio.to_thread(self._end)
        if isinstance(answer, worker.Failure):
            raise RewardError(answer.reason, answer.message, trace=answer.trace, place=answer.place)
        return answer

    def stop(self) -> None:
        """Ask the process to end; `close` waits for it."""
        self._is_closed = True
        if (pool := self._pool) is not None:
            pool.stop()

    def close(self) -> None:
        """End the process, whatever it does, for good."""
        self.stop()
        self._end()

    def _running(self) -> ProcessPool:
        """The pool, a new one if there is none or if its process was killed while it had nothing to do.

        The kernel ends the process with the thread that runs this: one that lives as long as the learner's loops.
        """
        with self._lock:
            if self._pool is not None and self._pool.active:
                return self._pool
            self._join()
            if self._is_closed:
                raise RuntimeError("the rewards are closed")
            with _signals_blocked():
                self._pool = ProcessPool(1, initializer=worker.start, initargs=(os.getpid(),), context=self._context)
                self._pool.schedule(worker.preload, args=(self._names,))
            return self._pool

    def _end(self) -> None:
        with self._lock:
            self._join()

    def _join(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None
            self._context.kill()


class _Groups(SpawnContext):
    """Starts processes, each of which makes a group of its own, and knows them."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """What pebble calls for a worker."""
        process = SpawnProcess(*args, **options)
        self._begun.append(process)
        return process

    def kill(self) -> None:
        """Kill what the workers have left, which have ended themselves."""
        for process in self._begun:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
        self._begun.clear()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Threads and processes that are started here never see Ctrl-C: they inherit the mask of this thread.

    Nor SIGTERM, which a process unblocks once it has its own handler.
    """
    resource_tracker.ensure_running()  # when it starts, it unblocks both
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
