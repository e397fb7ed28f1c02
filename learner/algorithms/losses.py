"""The policy-gradient loss over one pack: tensors in, tensors out.

With A the advantage of a token's completion, p the policy, r = p / old p and m the reference policy, the loss of a
token is

    - w * objective - entropy_coef * entropy + kl_coef * (m/p - log(m/p) - 1)     the "k3" estimate of KL(p || m)

with c = clip(r, 1 - clip_low, 1 + clip_high), |x| = x without gradient, and as the objective one of

    ppo     min(r * A, c * A)                                  arXiv 1707.06347, equation 7
            max(that, clip_dual * A) where A < 0               arXiv 1912.09729, equation 5
    gspo    as ppo with r = |s| * p / |p|, s the geometric mean of the ratios of its completion's tokens
                                                               arXiv 2507.18071, equations 7 and 14
    cispo   |c| * A * log p                                    arXiv 2506.13585, equations 4 and 5

With `kl_penalty: reward` the KL is not a term of the loss: each token has a reward of -kl_coef * log(old p / m) of its
own (arXiv 1909.08593, equation 2), which counts for it and the tokens before it, and is not compared within the group:

    A_t = A - kl_coef * sum over i >= t of log(old p_i / m_i)

Above, w = 1, or for rollouts of an engine that differs numerically from the trainer the truncated importance weight
min(q / actor, cap), or 0 for q / actor outside a range (masked importance sampling), with q the old policy if that is
the learner's and else p. A batch is the weighted sum of its
tokens; `token_weights` has the denominators. They are those of the whole batch over all ranks and micro-batches, so
that packs may simply be summed. With `mask_truncated_completions` the weight of a completion that was cut off is 0, its
entropy and KL included (overlong filtering, arXiv 2503.14476, section 3.4); the denominators still count it.

Nothing here hides a value that is not finite: it reaches the loss, and the step is skipped (learner.training.step).
Log-ratios are cut at +-20 before `exp`; beyond that the clip decides anyway.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.config.algorithm import AlgorithmConfig

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Counts over the whole training batch: all ranks, all micro-batches."""

    num_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of one pack, and detached float32 values for each of its N tokens."""

    loss: Tensor
    """Scalar with gradient: this pack's share of the batch's loss."""
    clipped: Tensor
    """1 where the clip took the gradient away."""
    ratio: Tensor
    """p / old policy."""
    mismatch_kl: Tensor
    """k3 estimate of KL(actor || learner)."""
    reference_kl: Tensor
    """k3 estimate of KL(learner || reference); zeros without a reference."""
    masked: Tensor
    """1 where the token was left out: learner and actor disagree too much about it, or its completion was cut off."""


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    actor_logprobs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    totals: BatchTotals,
    config: AlgorithmConfig,
    *,
    reference_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    truncated: Tensor | None = None,
) -> LossTerms:
    """This pack's share of the loss.

    Args:
        logprobs: float32 `[N]`, of the current policy, with gradient.
        entropy: float32 `[N]`, with gradient.
        actor_logprobs: float32 `[N]`, of the distribution that was sampled.
        advantages: float32 `[S]`, one for each completion.
        sequence_ids: int64 `[N]`, the completion of each token, 0 to S - 1; each has a token.
        totals: denominators.
        config: coefficients.
        reference_logprobs: float32 `[N]`; needed if `config.kl_coef` is not 0.
        old_logprobs: float32 `[N]`, of the learner before the batch, for `config.old_policy: learner`; None
            where that is the current policy, at a batch's only optimizer step.
        truncated: bool `[S]`, completions that were cut off; needed for `config.mask_truncated_completions`.

    Raises:
        ValueError: something that the settings need is missing.
    """
    weights = token_weights(sequence_ids, totals, config, truncated)
    token_advantages = advantages[sequence_ids]
    old = actor_logprobs
    if config.old_policy == "learner":
        old = old_logprobs if old_logprobs is not None else logprobs.detach()
    if config.kl_coef and reference_logprobs is None:
        raise ValueError("kl_coef needs the log-probabilities of a reference policy")
    if config.kl_penalty == "reward" and reference_logprobs is not None:
        penalties = suffix_sums(old - reference_logprobs, sequence_ids, len(advantages))
        token_advantages = token_advantages - config.kl_coef * penalties
    ratio = _ratio(logprobs - old)
    if config.policy_loss == "gspo":
        ratio = sequence_ratio(logprobs, old, sequence_ids, len(advantages))
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.policy_loss == "cispo":
        objective = clipped_ratio.detach() * token_advantages * logprobs
    else:
        objective = torch.minimum(ratio * token_advantages, clipped_ratio * token_advantages)
    if config.clip_dual is not None:
        floor = config.clip_dual * token_advantages
        objective = torch.where(token_advantages < 0, torch.maximum(objective, floor), objective)
    correction = _ratio((logprobs.detach() if config.old_policy == "actor" else old) - actor_logprobs)
    if config.importance_cap is not None:
        objective = objective * correction.clamp(max=config.importance_cap)
    masked = (weights == 0).float()
    if config.importance_mask is not None:
        low, high = config.importance_mask
        disagrees = (correction < low) | (correction > high)
        objective = torch.where(disagrees, 0.0, objective)
        masked = torch.maximum(masked, disagrees.float())
    token_loss = -objective - config.entropy_coef * entropy
    reference_kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        reference_kl = k3(reference_logprobs - logprobs)
    if config.kl_penalty == "loss":
        token_loss = token_loss + config.kl_coef * reference_kl
    with torch.no_grad():
        clipped = _is_clipped(ratio, clipped_ratio, token_advantages, config).float()
        mismatch_kl = k3(logprobs - actor_logprobs)
    return LossTerms((weights * token_loss).sum(), clipped, ratio.detach(), mismatch_kl, reference_kl.detach(), masked)


def _is_clipped(ratio: Tensor, clipped_ratio: Tensor, token_advantages: Tensor, config: AlgorithmConfig) -> Tensor:
    """bool `[N]`: where the ratio itself is not in the objective."""
    if config.policy_loss == "cispo":
        return clipped_ratio != ratio
    clipped = clipped_ratio * token_advantages < ratio * token_advantages
    if config.clip_dual is not None:
        clipped |= (token_advantages < 0) & (ratio > config.clip_dual)
    return clipped


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """float32 `[N]`: for each token the geometric mean of the ratios of its completion, with the token's own gradient.

    The completion's ratio is the exponential of the mean of `logprobs - old_logprobs` over its tokens.
    """
    lengths = torch.bincount(sequence_ids)
    sums = torch.zeros(num_sequences, dtype=logprobs.dtype, device=logprobs.device)
    means = sums.index_add(0, sequence_ids, logprobs.detach() - old_logprobs) / lengths
    return _ratio(means[sequence_ids] + logprobs - logprobs.detach())


def suffix_sums(values: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """`[N]`: for each token the sum of `values` over itself and the later tokens of its completion."""
    values = values.double()
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=values.device).index_add(0, sequence_ids, values)
    until = values.cumsum(0)  # over all completions before it too
    before = sums.cumsum(0) - sums
    return (sums[sequence_ids] - (until - before[sequence_ids]) + values).float()


def token_weights(
    sequence_ids: Tensor, totals: BatchTotals, config: AlgorithmConfig, truncated: Tensor | None = None
) -> Tensor:
    """float32 `[N]`: what each token counts in the batch.

    - `token-mean`: 1 / tokens of the batch (DAPO, arXiv 2503.14476).
    - `seq-mean-token-mean`: 1 / (completions of the batch * tokens of this completion) (GRPO).
    - `seq-mean-token-sum-norm`: 1 / (completions of the batch * `max_completion_tokens`) (Dr. GRPO).

    With `mask_truncated_completions` those of completions that were cut off, by `truncated` `[S]`, are 0.
    """
    if config.aggregation == "token-mean":
        weights = torch.full(sequence_ids.shape, 1 / totals.num_tokens, device=sequence_ids.device)
    elif config.aggregation == "seq-mean-token-mean":
        lengths = torch.bincount(sequence_ids)
        weights = 1 / (totals.num_sequences * lengths[sequence_ids].float())
    else:
        assert config.max_completion_tokens is not None  # AlgorithmConfig has checked it
        weight = 1 / (totals.num_sequences * config.max_completion_tokens)
        weights = torch.full(sequence_ids.shape, weight, device=sequence_ids.device)
    if not config.mask_truncated_completions:
        return weights
    if truncated is None:
        raise ValueError("mask_truncated_completions needs to know which completions were cut off")
    return weights * ~truncated[sequence_ids]


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = log(q / p), at samples of p: an unbiased, non-negative estimate of KL(p || q).

    http://joschu.net/blog/kl-approx.html
    """
    x = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return x.exp() - x - 1


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
