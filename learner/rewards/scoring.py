"""The reward of a completion: the weighted sum of what the functions say of it."""

import math
from collections.abc import Sequence

import numpy as np

from learner.rewards.base import GroupReward, RewardError, ScoringTask


def score(task: ScoringTask, rewards: Sequence[GroupReward], weights: Sequence[float]) -> list[float]:
    """One number for each completion of the group, finite in float32.

    A function that says None of a completion is left out of its sum. Raises `RewardError`, also if all say None.
    """
    values = [reward(task) for reward in rewards]
    return [_total(task, index, of_one, weights) for index, of_one in enumerate(zip(*values, strict=True))]


def _total(task: ScoringTask, index: int, values: Sequence[float | None], weights: Sequence[float]) -> float:
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    if not terms:
        raise RewardError("REWARD_NOT_A_NUMBER", f"{task.where(index)}: every reward function returned None")
    total = sum(terms)
    with np.errstate(over="ignore"):
        if not math.isfinite(np.float32(total)):
            raise RewardError("REWARD_NOT_FINITE", f"{task.where(index)}: the rewards add up to {total!r}")
    return total
