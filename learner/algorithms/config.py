"""Settings of the loss. Imports no torch."""

from typing import Literal, Self

import pydantic

from common.config import Config

AdvantageEstimator = Literal["grpo", "dr_grpo", "rloo"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


class LossConfig(Config):
    """How rewards become a gradient.

    The published recipes: GRPO is `advantage: grpo, aggregation: seq-mean-token-mean`; Dr. GRPO is `advantage: dr_grpo,
    aggregation: seq-mean-token-sum-norm`; DAPO's loss is `advantage: grpo, aggregation: token-mean, clip_high: 0.28`.
    """

    advantage: AdvantageEstimator = "grpo"
    aggregation: Aggregation = "token-mean"
    max_completion_tokens: int | None = pydantic.Field(default=None, ge=1)
    """The constant that `seq-mean-token-sum-norm` divides by; needed there, and only there."""
    clip_low: float = pydantic.Field(default=0.2, ge=0, le=1)
    clip_high: float = pydantic.Field(default=0.2, ge=0)
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the KL to the reference policy."""
    old_policy: Literal["actor", "learner"] = "actor"
    """What the clipped ratio is relative to. `actor`: the log-probabilities that came with the rollout, so that
    clipping bounds how far a stale or numerically different policy is trusted. `learner`: the learner's own before the
    update. With one optimizer step for each batch that ratio is 1, clipping never acts, and the difference to the
    actor is left to `importance_cap`."""
    importance_cap: float | None = pydantic.Field(default=None, gt=0)
    """Truncated importance sampling: each token's loss is weighted by min(learner / actor probability, cap). Only with
    `old_policy: learner`; with `actor` the ratio holds that factor already. Off if unset."""

    @pydantic.model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        if self.importance_cap is not None and self.old_policy == "actor":
            raise ValueError(
                "importance_cap needs old_policy: learner (with actor the ratio is the correction already)"
            )
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.max_completion_tokens is not None):
            raise ValueError(
                "max_completion_tokens and aggregation: seq-mean-token-sum-norm go together; set both or none"
            )
        return self
