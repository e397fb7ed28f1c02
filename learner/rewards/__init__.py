"""Rewards: Python functions that score completions, named in the configuration. docs/rewards.md says how."""

from learner.rewards.base import RewardError, Rewards
from learner.rewards.runner import RewardRunner

__all__ = ["RewardError", "RewardRunner", "Rewards"]
