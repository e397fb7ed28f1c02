import math
import statistics
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.advantages import group_advantages
from learner.algorithms.config import LossConfig
from learner.algorithms.losses import BatchTotals, k3, policy_loss

REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12)


@given(rewards=REWARDS)
def test_advantages_are_those_of_a_naive_loop(rewards: list[float]) -> None:
    n, mean = len(rewards), statistics.fmean(rewards)
    equal = len(set(rewards)) == 1
    std = 0.0 if equal else math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1))
    expected = {
        "grpo": [(r - mean) / (std + 1e-6) for r in rewards],
        "dr_grpo": [r - mean for r in rewards],
        "rloo": [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)],
    }
    for estimator, values in expected.items():
        actual = group_advantages(np.array(rewards, np.float32), estimator)  # type: ignore[arg-type]
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, [0.0] * n if equal else values, atol=1e-4, rtol=1e-4)


def test_advantages_by_hand() -> None:
    rewards = np.array([1, 0, 0, 0], np.float32)
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    np.testing.assert_allclose(group_advantages(rewards, "dr_grpo"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(group_advantages(rewards, "rloo"), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_teach_exactly_nothing(estimator: Any) -> None:
    assert group_advantages(np.full(7, 0.1, np.float32), estimator).tolist() == [0.0] * 7


@pytest.mark.parametrize("rewards", [[1.0], [], [1.0, math.nan], [math.inf, 0.0]])
def test_rewards_that_cannot_be_compared_are_errors(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(np.array(rewards, np.float32), "grpo")


def naive_loss(
    tokens: list[list[dict[str, float]]],
    advantages: list[float],
    config: LossConfig,
    batch_tokens: int,
    batch_sequences: int,
) -> float:
    """The formula of learner.algorithms.losses, one token at a time."""
    total = 0.0
    for sequence, advantage in zip(tokens, advantages, strict=True):
        for token in sequence:
            p, actor = token["logprob"], token["actor"]
            ratio = math.exp(p - (actor if config.old_policy == "actor" else p))
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            value = -min(ratio * advantage, clipped * advantage)
            if config.importance_cap is not None:
                value *= min(math.exp(p - actor), config.importance_cap)
            value -= config.entropy_coef * token["entropy"]
            m = token["reference"]
            value += config.kl_coef * (math.exp(m - p) - (m - p) - 1)
            if config.aggregation == "token-mean":
                total += value / batch_tokens
            elif config.aggregation == "seq-mean-token-mean":
                total += value / len(sequence) / batch_sequences
            else:
                assert config.max_completion_tokens is not None
                total += value / config.max_completion_tokens / batch_sequences
    return total


CONFIGS = [
    LossConfig(),
    LossConfig(clip_low=0.1, clip_high=0.4, entropy_coef=0.05),
    LossConfig(aggregation="seq-mean-token-mean", kl_coef=0.3),
    LossConfig(aggregation="seq-mean-token-sum-norm", max_completion_tokens=9, advantage="dr_grpo"),
    LossConfig(old_policy="learner", importance_cap=1.5, entropy_coef=-0.1),
    LossConfig(old_policy="learner", aggregation="seq-mean-token-mean"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_metrics_are_those_of_a_naive_loop(config: LossConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, 4).tolist()
    names = ("logprob", "actor", "entropy", "reference")
    tokens = [[{name: float(rng.normal(-1, 0.7)) for name in names} for _ in range(n)] for n in lengths]
    advantages = rng.normal(size=4).tolist()
    flat = {name: torch.tensor([t[name] for s in tokens for t in s]) for name in names}
    sequence_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    terms = policy_loss(
        flat["logprob"].requires_grad_(),
        flat["entropy"],
        flat["actor"],
        torch.tensor(advantages),
        sequence_ids,
        BatchTotals(num_tokens=31, num_sequences=8),
        config,
        flat["reference"],
    )
    assert terms.loss.item() == pytest.approx(naive_loss(tokens, advantages, config, 31, 8), rel=1e-4, abs=1e-6)
    clipped = []
    for sequence, advantage in zip(tokens, advantages, strict=True):
        for t in sequence:
            ratio = math.exp(t["logprob"] - t["actor"]) if config.old_policy == "actor" else 1.0
            clipped.append(float(ratio > 1 + config.clip_high if advantage > 0 else ratio < 1 - config.clip_low))
    assert terms.clipped.tolist() == clipped


def test_the_gradient_of_old_policy_learner_is_reinforce() -> None:
    """Ratio 1 everywhere, gradient -A * grad(logprob), clipped or not."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    zeros, ids = torch.zeros(3), torch.tensor([0, 0, 1])
    config = LossConfig(old_policy="learner", clip_low=0.0, clip_high=0.0)
    terms = policy_loss(
        logprobs, zeros, torch.tensor([-9.0, 0.0, -0.5]), torch.tensor([2.0, -1.0]), ids, BatchTotals(3, 2), config
    )
    terms.loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), [-2 / 3, -2 / 3, 1 / 3], rtol=1e-6)
    assert terms.ratio.tolist() == [1.0, 1.0, 1.0]


def test_a_clipped_token_has_no_gradient_and_the_importance_weight_is_a_constant() -> None:
    actor = torch.tensor([-1.0, -1.0])
    ids, advantages = torch.tensor([0, 1]), torch.tensor([1.0, -1.0])
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)  # ratio e
    policy_loss(logprobs, torch.zeros(2), actor, advantages, ids, BatchTotals(2, 2), LossConfig()).loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), [0.0, math.e / 2], rtol=1e-6)
    logprobs.grad.zero_()
    config = LossConfig(old_policy="learner", importance_cap=2.0)
    policy_loss(logprobs, torch.zeros(2), actor, advantages, ids, BatchTotals(2, 2), config).loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.0, 1.0]))


def test_k3_estimates_the_divergence() -> None:
    """In expectation over p it is KL(p || q), summed exactly over three outcomes."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    assert (p * k3((q / p).log())).sum().item() == pytest.approx(exact.item(), rel=1e-5)
    assert bool(torch.isfinite(k3(torch.tensor([1000.0, -1000.0]))).all())


def test_values_that_are_not_finite_are_not_hidden() -> None:
    logprobs = torch.tensor([math.nan, -1.0], requires_grad=True)
    terms = policy_loss(
        logprobs,
        torch.zeros(2),
        torch.zeros(2),
        torch.ones(1),
        torch.zeros(2, dtype=torch.int64),
        BatchTotals(2, 1),
        LossConfig(),
    )
    assert math.isnan(terms.loss.item())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"importance_cap": 2.0}, "importance_cap needs old_policy: learner"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "max_completion_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"clip_hi": 0.1}, "clip_hi"),
    ],
)
def test_a_setting_without_effect_is_an_error(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=match):
        LossConfig(**settings)


def test_kl_needs_a_reference() -> None:
    values = torch.zeros(1)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(
            values,
            values,
            values,
            values,
            torch.zeros(1, dtype=torch.int64),
            BatchTotals(1, 1),
            LossConfig(kl_coef=0.1),
        )
