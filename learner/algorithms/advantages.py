"""Group-relative advantages: the rewards of one prompt's completions against each other; no value network.

A new estimator is one function of the rewards of a group and one entry in `ESTIMATORS`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from common.types import FloatArray
from learner.algorithms.config import AdvantageEstimator

Rewards = npt.NDArray[np.float64]

_EPSILON = 1e-6


def group_advantages(rewards: FloatArray, estimator: AdvantageEstimator) -> FloatArray:
    """Advantages of one group.

    Args:
        rewards: `[n]`, n >= 2, finite.
        estimator: a key of `ESTIMATORS`.

    Returns:
        float32 `[n]`; they sum to 0, and are exactly 0 where all rewards are equal.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.

    Example: rewards [1, 0, 0, 0] give [0.75, -0.25, -0.25, -0.25] with `dr_grpo`, [1, -1/3, -1/3, -1/3] with `rloo`
    and [1.5, -0.5, -0.5, -0.5] with `grpo`.
    """
    if rewards.ndim != 1 or len(rewards) < 2:
        raise ValueError(f"a group needs at least two rewards to compare, got shape {rewards.shape}")
    values = rewards.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite numbers, got {rewards.tolist()}")
    if values.min() == values.max():
        return np.zeros(len(values), np.float32)  # the mean of equal numbers may differ from them by rounding
    return ESTIMATORS[estimator](values).astype(np.float32)


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
    advantages: Rewards = (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))
    return advantages


ESTIMATORS: Mapping[str, Callable[[Rewards], Rewards]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
