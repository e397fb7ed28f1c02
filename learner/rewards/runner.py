"""Runs a reward function off the event loop, with a deadline."""

import asyncio
import math
import numbers
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.types import Completion, FloatArray
from learner.rewards.load import RewardFunction
from learner.types import PromptSample


class RewardError(Exception):
    """A group has no rewards.

    `reason` says why: REWARD_RAISED, REWARD_TIMEOUT, REWARD_NOT_A_NUMBER or REWARD_NOT_FINITE.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(eq=False, slots=True)
class _Job:
    score: Callable[["_Job"], FloatArray]
    loop: asyncio.AbstractEventLoop
    started: "asyncio.Future[None]"
    rewards: "asyncio.Future[FloatArray]"
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Nobody waits any more."""


class RewardRunner:
    """Scores whole groups in threads of its own.

    The threads are daemons: a reward that never returns costs its group (and a thread, which is replaced), not the run
    and not the exit of the process.

    Args:
        function: as `load_reward` returns it.
        decode: token ids to text, special tokens left out; called in the same threads.
        timeout_s: for one group, from the moment a thread takes it up.
        num_threads: groups scored at the same time.
    """

    def __init__(
        self,
        function: RewardFunction,
        *,
        decode: Callable[[Sequence[int]], str],
        timeout_s: float = 30.0,
        num_threads: int = 2,
    ) -> None:
        self._function = function
        self._decode = decode
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_threads = num_threads
        for _ in range(num_threads):
            self._add_thread()

    async def score(self, sample: PromptSample, completions: Sequence[Completion]) -> FloatArray:
        """Rewards `[n]` of a group's completions, in their order. Raises `RewardError`."""
        loop = asyncio.get_running_loop()
        job = _Job(lambda job: self._score(sample, completions, job), loop, loop.create_future(), loop.create_future())
        self._jobs.put(job)
        try:
            await job.started
            async with asyncio.timeout(self._timeout_s):
                return await job.rewards
        except TimeoutError:
            self._add_thread()  # for the one that hangs
            raise RewardError("REWARD_TIMEOUT", f"row {sample.row}: no reward within {self._timeout_s:g} s") from None
        finally:
            job.abandoned.set()

    def close(self) -> None:
        """Let the threads end when they are idle."""
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _add_thread(self) -> None:
        threading.Thread(target=self._work, name="reward", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.abandoned.is_set():
                continue
            result: FloatArray | RewardError
            try:
                job.loop.call_soon_threadsafe(_resolve, job.started, None)
                try:
                    result = job.score(job)
                except RewardError as error:
                    result = error
                late = job.abandoned.is_set()
                job.loop.call_soon_threadsafe(_resolve, job.rewards, result)
            except RuntimeError:  # the loop is closed: the run is over
                return
            if late:  # another thread has taken this one's place
                return

    def _score(self, sample: PromptSample, completions: Sequence[Completion], job: _Job) -> FloatArray:
        rewards = np.zeros(len(completions), dtype=np.float32)
        for i, completion in enumerate(completions):
            if job.abandoned.is_set():
                raise RewardError("REWARD_TIMEOUT", f"row {sample.row}: given up after {i} completions")
            rewards[i] = self._score_one(sample, completion)
        return rewards

    def _score_one(self, sample: PromptSample, completion: Completion) -> float:
        where = f"row {sample.row}, completion {completion.index}"
        token_ids = completion.token_ids.tolist()
        try:
            text = self._decode(token_ids)
            value: Any = self._function(
                completion=text,
                solution_str=text,
                ground_truth=sample.ground_truth,
                images=sample.images,
                extra=sample.extra,
                extra_info=sample.extra.get("extra_info", sample.extra),
                data_source=sample.data_source,
                prompt=sample.messages,
                token_ids=token_ids,
                finish_reason=completion.finish_reason.value,
            )
        except Exception as error:  # a user's code: whatever it raises costs this group
            raise RewardError("REWARD_RAISED", f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardError("REWARD_NOT_A_NUMBER", f"{where}: the reward returned {value!r}")
        if not math.isfinite(value):
            raise RewardError("REWARD_NOT_FINITE", f"{where}: the reward returned {value!r}")
        return float(value)


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    if future.done():
        return
    if isinstance(result, RewardError):
        future.set_exception(result)
    else:
        future.set_result(result)
