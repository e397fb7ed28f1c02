"""Rewards: Python functions that score one completion, named by import path."""

from learner.rewards.load import RewardFunction, load_reward
from learner.rewards.runner import RewardError, RewardRunner

__all__ = ["RewardError", "RewardFunction", "RewardRunner", "load_reward"]
