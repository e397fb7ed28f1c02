"""`reward`: what a completion is worth."""

from typing import Self

from pydantic import Field, FiniteFloat, model_validator

from common.config import Config


class RewardConfig(Config):
    """What a completion is worth."""

    functions: tuple[str, ...] = Field(("exact_match",), min_length=1)
    """Each is one of those that come along (docs/rewards.md), one that a package offers by a name, or
    "module:function". The reward of a completion is their weighted sum."""
    weights: tuple[FiniteFloat, ...] = ()
    """One for each function; empty: 1 each."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds that the rewards of one group may take."""
    num_processes: int = Field(2, ge=1)
    """Groups scored at the same time, each in a process of its own."""

    @model_validator(mode="after")
    def _one_weight_for_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.functions):
            raise ValueError(
                f"there are {len(self.weights)} weights for {len(self.functions)} functions; give one for each, or "
                "none (reward.weights='[]')"
            )
        return self
