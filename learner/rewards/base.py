"""What the parts of rewards share: the work, the failure and the interface.

    sampled completions --ScoringTask--> functions, in a process of their own --Scores--> Group

A failure is never a number: it is raised, and the group is dropped.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from common.types import Completion
from learner.types import PromptSample, Scores

# Of a message, which goes to the terminal: a function may return, or raise, all that the model wrote.
_MAX_CHARACTERS = 2000


class RewardError(Exception):
    """A group has no rewards.

    `reason` says why: REWARD_RAISED, REWARD_TIMEOUT, REWARD_CRASHED, REWARD_NOT_A_NUMBER or REWARD_NOT_FINITE.
    `trace` is the traceback of what a function raised at `place`; empty for other reasons.
    """

    def __init__(self, reason: str, message: str, *, trace: str = "", place: str = "") -> None:
        super().__init__(message if len(message) <= _MAX_CHARACTERS else f"{message[:_MAX_CHARACTERS]} ...")
        self.reason = reason
        self.trace = trace
        self.place = place


class Rewards(Protocol):
    """Scores groups."""

    async def score(self, sample: PromptSample, completions: Sequence[Completion]) -> Scores:
        """What a group's completions are worth, in their order. Raises `RewardError`."""
        ...


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """One group, as reward functions see it: plain values that can be sent to another process.

    Example: `ScoringTask(sample, texts=("4", "5"), token_ids=([19], [20]), finish_reasons=("stop", "stop"))`.
    """

    sample: PromptSample
    texts: tuple[str, ...]
    """Of the completions, special tokens left out."""
    token_ids: tuple[list[int], ...]
    finish_reasons: tuple[str, ...]
    """"stop" or "length"."""

    @classmethod
    def of(
        cls, sample: PromptSample, completions: Sequence[Completion], decode: Callable[[Sequence[int]], str]
    ) -> Self:
        """The task of a sampled group; `decode` turns ids into text."""
        token_ids = tuple(completion.token_ids.tolist() for completion in completions)
        return cls(
            sample,
            texts=tuple(decode(ids) for ids in token_ids),
            token_ids=token_ids,
            finish_reasons=tuple(completion.finish_reason.value for completion in completions),
        )

    def where(self, index: int) -> str:
        """Names one completion in messages."""
        return f"row {self.sample.row}, completion {index}"


SCORE = "score"
"""The key of the reward in what a function of verl's form returns."""

Judgement = float | dict[str, float] | None
"""What a function says of one completion: its reward; that as "score" beside what else it measures; None: nothing."""

GroupReward = Callable[[ScoringTask], Sequence[Judgement]]
"""A loaded reward: one judgement for each completion. Raises `RewardError`."""


def as_number(value: Any, returned: object, where: str) -> float:
    """`value` as a finite float; `returned` is what the message shows. Raises `RewardError`."""
    if getattr(value, "ndim", None) == 0:  # scalars of numpy and torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise RewardError("REWARD_NOT_A_NUMBER", f"{where}: the reward returned {_shown(returned)}")
    try:
        number = float(value)
    except OverflowError:  # an int, as long as what the model wrote
        number = math.inf
    if not math.isfinite(number):
        raise RewardError("REWARD_NOT_FINITE", f"{where}: the reward returned {_shown(returned)}")
    return number


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        return f"a value of the type {type(value).__name__}, too long to be shown"
