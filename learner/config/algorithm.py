"""`algorithm`: how rewards become a gradient. Imports no torch.

`learner.algorithms` is pure, and imports this module: it imports pydantic and `common.config` alone.
"""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from common.config import Config

AdvantageEstimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
PolicyLoss = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


class AlgorithmConfig(Config):
    """How rewards become a gradient. `docs/algorithms.md` has the published recipes in these settings."""

    advantage: AdvantageEstimator = "grpo"
    """How the completions of a prompt are compared with each other."""
    aggregation: Aggregation = "token-mean"
    """How losses of tokens become one: their mean, or first that of each completion and then over completions."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The constant that `seq-mean-token-sum-norm` divides by; needed there, and only there."""
    policy_loss: PolicyLoss = "ppo"
    """`ppo`: clipped token ratios; `gspo`: clipped ratios of whole completions; `cispo`: clipped weights, so that no
    token loses its gradient."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio of new to old policy is clipped below 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""
    clip_dual: float | None = Field(None, gt=1)
    """Bounds the loss of tokens with a negative advantage at this many advantages. Only with `ppo`."""
    entropy_coef: FiniteFloat = 0.0
    """Weight of the entropy bonus."""
    kl_coef: FiniteFloat = Field(0.0, ge=0)
    """Weight of the KL to the reference policy, which is `model.path` as it was: a frozen copy, which takes as much
    memory again, or with LoRA the model without its adapter, which takes none."""
    kl_penalty: Literal["loss", "reward"] = "loss"
    """Where that KL goes: into the loss of each token (k3), or, as a penalty for each token, off the advantages of that
    token and those before it, once rewards have been compared (k1). Not with `reinforce_plus_plus`."""
    old_policy: Literal["actor", "learner"] = "actor"
    """What the clipped ratio is relative to. `actor`: the log-probabilities that came with the rollout, so that
    clipping bounds how far a stale or numerically different policy is trusted. `learner`: the learner's own before the
    batch (one more forward pass where a batch has several optimizer steps; with one step that ratio is 1 and clipping
    never acts), and the difference to the actor is left to `importance_cap`."""
    importance_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling: each token's loss is weighted by min(learner / actor probability, cap). Only with
    `old_policy: learner`; with `actor` the ratio holds that factor already. Off if unset."""
    importance_mask: tuple[float, float] | None = None
    """Masked importance sampling: tokens whose learner / actor probability lies outside [low, high] are left out of
    the gradient, and counted. Off if unset."""
    overlong_buffer: int = Field(0, ge=0)
    """Soft punishment of long answers: over the last so many tokens before `rollout.max_tokens`, a reward falls by up
    to `overlong_penalty`. 0: off."""
    overlong_penalty: float = Field(1.0, gt=0)
    """What a completion of full length loses of its reward; only with `overlong_buffer`."""
    mask_truncated_completions: bool = False
    """Completions that were cut off for their length count in the advantages of their group and in the denominators of
    the loss, but are left out of the gradient: whether they would have come to a right answer is not known."""

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        if self.importance_cap is not None and self.old_policy == "actor":
            raise ValueError(
                "importance_cap needs old_policy: learner (with actor the ratio is the correction already)"
            )
        if self.kl_penalty == "reward" and not self.kl_coef:
            raise ValueError("kl_penalty: reward needs a kl_coef")
        if self.kl_penalty == "reward" and self.advantage.startswith("reinforce_plus_plus"):
            # The paper brings rewards and penalties together to mean 0; here rewards alone are, before there is a KL.
            raise ValueError(
                f"kl_penalty: reward does not go with advantage: {self.advantage}, whose normalisation would have to "
                "include the penalties; use kl_penalty: loss"
            )
        if self.overlong_penalty != 1.0 and not self.overlong_buffer:
            raise ValueError("overlong_penalty needs an overlong_buffer")
        if self.clip_dual is not None and self.policy_loss != "ppo":
            raise ValueError("clip_dual belongs to policy_loss: ppo")
        if self.policy_loss == "gspo" and self.aggregation != "seq-mean-token-mean":
            raise ValueError("policy_loss: gspo weighs completions; it needs aggregation: seq-mean-token-mean")
        if self.importance_mask is not None and not 0 <= self.importance_mask[0] <= 1 <= self.importance_mask[1]:
            raise ValueError("importance_mask must be [low, high] with 0 <= low <= 1 <= high")
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.max_completion_tokens is not None):
            raise ValueError(
                "max_completion_tokens and aggregation: seq-mean-token-sum-norm go together; set both or none"
            )
        return self
