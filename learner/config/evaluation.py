"""`evaluation`: what is asked of the held-out rows beside one greedy completion each."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from common.config import Config


class EvaluationConfig(Config):
    """What is asked of the held-out rows beside one greedy completion each."""

    samples: int = Field(0, ge=0)
    """Sampled completions of each row, for pass@k. 0: none."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    """pass@k: the chance that one of k sampled completions passes."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    """Of the sampled completions."""
    pass_reward: float = 1.0
    """The reward at which a completion passes."""
    max_failed_share: float = Field(0.01, ge=0, lt=1)
    """Share of the held-out rows that may go without a score because their reward or group fails. The mean is then
    that of the others, and the run says of how many; with more the run ends."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.samples and max(self.k) > self.samples:
            raise ValueError(f"k goes up to {max(self.k)}, but there are {self.samples} samples")
        for name in ("k", "temperature", "pass_reward"):
            if not self.samples and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} needs samples")
        return self
