"""What runs inside a reward process. Imports no torch: a process starts in half a second.

It imports the functions itself, by name. What users' code does here (raise, hang, exit, crash) costs one group.
"""

import functools
import os
import pickle
import signal
from dataclasses import dataclass
from types import FrameType

from common.process.lifecycle import end_with_parent
from learner.rewards.base import GroupReward, RewardError, ScoringTask
from learner.rewards.load import load_rewards
from learner.rewards.scoring import score
from learner.types import Scores


@dataclass(frozen=True, slots=True)
class Failure:
    """A `RewardError` as it travels."""

    reason: str
    message: str
    trace: str = ""
    place: str = ""


def start(learner: int) -> None:
    """Call it first in the process. `learner` is the process id of the parent."""
    os.setpgid(0, 0)  # what a reward starts is of this group, and `RewardProcess` kills all of it
    # Who ends the learner may mean all of its processes, but it ends its step, and needs the rewards for that. It is a
    # handler, since programs that a reward starts would inherit that the signal is ignored.
    signal.signal(signal.SIGTERM, _go_on)
    signal.siginterrupt(signal.SIGTERM, False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked until here, see `RewardProcess`
    os.register_at_fork(after_in_child=functools.partial(signal.signal, signal.SIGTERM, signal.SIG_DFL))
    end_with_parent(signal.SIGKILL)
    if os.getppid() != learner:  # it died before the kernel knew
        os._exit(1)


def _go_on(_number: int, _frame: FrameType | None) -> None:
    pass


@functools.cache
def load(names: tuple[str, ...]) -> tuple[GroupReward, ...] | Failure:
    """The functions of these names, imported once."""
    try:
        return load_rewards(names)
    except Exception as error:  # noqa: BLE001 - a user's module: the reason of every group that needs it
        return Failure("REWARD_RAISED", f"the reward does not load in its process: {type(error).__name__}: {error}")


def preload(names: tuple[str, ...]) -> None:
    """`load`, before the first group has to wait for it."""
    load(names)


def run(names: tuple[str, ...], weights: tuple[float, ...], pickled: bytes, where: str) -> Scores | Failure:
    """Score one pickled `ScoringTask`, which the learner has made; `where` names it in messages."""
    rewards = load(names)
    if isinstance(rewards, Failure):
        return Failure(rewards.reason, f"{where}: {rewards.message}")
    try:
        task: ScoringTask = pickle.loads(pickled)  # noqa: S301 - from the parent process
        return score(task, names, rewards, weights)
    except RewardError as error:
        return Failure(error.reason, str(error), error.trace, error.place)
    except BaseException as error:  # noqa: BLE001 - sys.exit() too would otherwise be raised in the learner
        return Failure("REWARD_RAISED", f"{where}: {type(error).__name__}: {error}")
