"""The reward of a completion: the weighted sum of what the functions say of it."""

import math
from collections.abc import Sequence

import numpy as np

from learner.rewards.base import SCORE, GroupReward, Judgement, RewardError, ScoringTask
from learner.types import Scores


def score(task: ScoringTask, names: Sequence[str], rewards: Sequence[GroupReward], weights: Sequence[float]) -> Scores:
    """What each completion of the group is worth, finite in float32.

    A function that says None of a completion is left out of its sum. Raises `RewardError`, also if all say None.
    """
    parts: dict[str, list[float | None]] = {}
    values = []
    for name, reward in zip(names, rewards, strict=True):
        said = reward(task)
        parts[name] = [_value(judgement, SCORE) for judgement in said]
        values.append(parts[name])
        for key in sorted({key for judgement in said if isinstance(judgement, dict) for key in judgement} - {SCORE}):
            parts[f"{name}.{key}"] = [_value(judgement, key) for judgement in said]
    totals = [_total(task, index, of_one, weights) for index, of_one in enumerate(zip(*values, strict=True))]
    return Scores(np.array(totals, np.float32), parts)


def _value(judgement: Judgement, key: str) -> float | None:
    if isinstance(judgement, dict):
        return judgement.get(key)
    return judgement if key == SCORE else None


def _total(task: ScoringTask, index: int, values: Sequence[float | None], weights: Sequence[float]) -> float:
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    if not terms:
        raise RewardError("REWARD_NOT_A_NUMBER", f"{task.where(index)}: every reward function returned None")
    total = sum(terms)
    with np.errstate(over="ignore"):
        if not math.isfinite(np.float32(total)):
            raise RewardError("REWARD_NOT_FINITE", f"{task.where(index)}: the rewards add up to {total!r}")
    return total
