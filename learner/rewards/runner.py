"""The learner's side of rewards: text out of tokens, and a free process for each group."""

import asyncio
import pickle
from collections.abc import Callable, Sequence

from common import log as logging
from common.config import ConfigError
from common.types import Completion
from learner.rewards.base import RewardError, ScoringTask
from learner.rewards.load import load_rewards, undisturbed
from learner.rewards.process import RewardProcess
from learner.types import PromptSample, Scores

log = logging.get_logger(__name__)

# A function whose code is made at run time has a place of its own each time.
_MAX_TRACES = 20


class RewardRunner:
    """Scores whole groups in processes of its own.

    A function that raises, hangs or takes its process down costs its group, never the run. The processes end with this
    one, however it ends.

    Args:
        names: of the reward functions; `learner.rewards.load` says what a name is.
        weights: of the functions, 1 each if empty.
        decode: token ids to text, special tokens left out; called in threads of this process.
        timeout_s: for one group, from the moment that a process takes it up.
        num_processes: groups scored at the same time.

    Raises:
        ConfigError: a function cannot be found or called, or there is not one weight for each.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] = (),
        *,
        decode: Callable[[Sequence[int]], str],
        timeout_s: float = 30.0,
        num_processes: int = 2,
    ) -> None:
        if weights and len(weights) != len(names):
            raise ConfigError(f"reward: {len(weights)} weights for {len(names)} functions")
        with undisturbed():
            load_rewards(names)  # mistakes show here, not in the first group
        self._decode = decode
        self._processes = [
            RewardProcess(tuple(names), tuple(weights or [1.0] * len(names)), timeout_s=timeout_s)
            for _ in range(num_processes)
        ]
        self._logged: set[str] = set()
        self._idle: asyncio.Queue[RewardProcess] = asyncio.Queue()
        for process in self._processes:
            self._idle.put_nowait(process)

    async def score(self, sample: PromptSample, completions: Sequence[Completion]) -> Scores:
        """What a group's completions are worth, in their order. Raises `RewardError`."""
        pickled = await asyncio.to_thread(self._pickle, sample, completions)
        process = await self._idle.get()
        try:
            return await process.score(pickled, f"row {sample.row}")
        except RewardError as error:
            self._log(error)
            raise
        finally:
            self._idle.put_nowait(process)

    def close(self) -> None:
        """End the processes. Takes some tenths of a second."""
        for process in self._processes:
            process.stop()
        for process in self._processes:
            process.close()

    def _log(self, error: RewardError) -> None:
        """The traceback, once for each place that it comes from."""
        if error.trace and error.place not in self._logged and len(self._logged) < _MAX_TRACES:
            self._logged.add(error.place)
            log.warning("reward raised", place=error.place, exception=error.trace)

    def _pickle(self, sample: PromptSample, completions: Sequence[Completion]) -> bytes:
        task = ScoringTask.of(sample, completions, self._decode)
        try:
            return pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # whatever the row's own objects raise
            message = f"row {sample.row}: its columns cannot be sent to a reward process: {error}"
            raise RewardError("REWARD_RAISED", message) from error
