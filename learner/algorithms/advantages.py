"""Advantages from rewards alone: completions against each other; no value network.

An estimator looks at the rewards of one group, and may be followed by a normalisation over all tokens of the batch. A
new one is a function and an entry in `ESTIMATORS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.types import FloatArray, IntArray
from learner.config.algorithm import AdvantageEstimator

Rewards = npt.NDArray[np.float64]

_EPSILON = 1e-6


def advantages(
    rewards: Sequence[FloatArray], lengths: Sequence[IntArray], estimator: AdvantageEstimator
) -> list[FloatArray]:
    """Advantages of every completion of a batch.

    Args:
        rewards: of each group, float32 `[n]`, n >= 2, finite.
        lengths: tokens of each completion, int `[n]` for each group.
        estimator: a key of `ESTIMATORS`.

    Returns:
        float32 `[n]` for each group. Those that compare within the group alone sum to 0 there, and are exactly 0 where
        all rewards of the group are equal; `reinforce_plus_plus_baseline` then normalises over the whole batch.

    Raises:
        ValueError: fewer than two rewards in a group, or one that is not finite.

    Example: a group with rewards [1, 0, 0, 0] gets [0.75, -0.25, -0.25, -0.25] with `dr_grpo`,
    [1, -1/3, -1/3, -1/3] with `rloo` and [1.5, -0.5, -0.5, -0.5] with `grpo`.
    """
    chosen = ESTIMATORS[estimator]
    values = [chosen.within_group(_checked(group)) for group in rewards]
    if chosen.normalise_batch and values:
        everything = np.concatenate(values)
        tokens = np.concatenate(lengths)  # each of them has its completion's advantage
        mean = np.average(everything, weights=tokens)
        std = np.sqrt(np.average((everything - mean) ** 2, weights=tokens))
        values = [(group - mean) / (std + _EPSILON) for group in values]
    return [group.astype(np.float32) for group in values]


def _checked(rewards: FloatArray) -> Rewards:
    if len(rewards) < 2:
        raise ValueError(f"a group needs at least two rewards to compare, got {len(rewards)}")
    values = rewards.astype(np.float64)  # so that the mean of equal float32 numbers is exactly that number
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite numbers, got {rewards.tolist()}")
    return values


def grpo(rewards: Rewards) -> Rewards:
    """(r - mean) / (std + 1e-6), std with n - 1. DeepSeekMath, arXiv 2402.03300, section 4.1.2."""
    advantages: Rewards = (rewards - rewards.mean()) / (rewards.std(ddof=1) + _EPSILON)
    return advantages


def dr_grpo(rewards: Rewards) -> Rewards:
    """r - mean: without the division, which favours prompts that are nearly solved or hopeless. arXiv 2503.20783."""
    advantages: Rewards = rewards - rewards.mean()
    return advantages


def rloo(rewards: Rewards) -> Rewards:
    """r minus the mean of the others = n / (n - 1) * (r - mean). REINFORCE leave-one-out, arXiv 2402.14740."""
    return dr_grpo(rewards) * (len(rewards) / (len(rewards) - 1))


def plain(rewards: Rewards) -> Rewards:
    """r as it is."""
    return rewards


@dataclass(frozen=True, slots=True)
class Estimator:
    """How rewards of one group are compared; whether the outcome gets mean 0 and std 1 over all tokens of the batch."""

    within_group: Callable[[Rewards], Rewards]
    normalise_batch: bool = False


ESTIMATORS: Mapping[AdvantageEstimator, Estimator] = {
    "grpo": Estimator(grpo),
    "dr_grpo": Estimator(dr_grpo),
    "rloo": Estimator(rloo),
    # REINFORCE++, arXiv 2501.03262, without its KL, and its variant with the group's mean as the baseline.
    "reinforce_plus_plus": Estimator(plain, normalise_batch=True),
    "reinforce_plus_plus_baseline": Estimator(dr_grpo, normalise_batch=True),
}
