import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.types import FloatArray
from learner.algorithms.advantages import ESTIMATORS, advantages
from learner.algorithms.losses import BatchTotals, k3, policy_loss
from learner.algorithms.shaping import overlong_penalty
from learner.config.algorithm import AlgorithmConfig


def group_advantages(rewards: FloatArray, estimator: Any) -> FloatArray:
    """Of a batch of one group."""
    (values,) = advantages([rewards], [np.ones(len(rewards), np.int32)], estimator)
    return values


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
        actual = group_advantages(np.array(rewards, np.float32), estimator)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, [0.0] * n if equal else values, atol=1e-4, rtol=1e-4)


def test_advantages_by_hand() -> None:
    rewards = np.array([1, 0, 0, 0], np.float32)
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    np.testing.assert_allclose(group_advantages(rewards, "dr_grpo"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(group_advantages(rewards, "rloo"), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS.keys() - {"reinforce_plus_plus"}))
@given(reward=st.floats(width=32, allow_nan=False, allow_infinity=False), num=st.integers(2, 64))
def test_equal_rewards_teach_exactly_nothing(estimator: Any, reward: float, num: int) -> None:
    assert group_advantages(np.full(num, reward, np.float32), estimator).tolist() == [0.0] * num


COMPLETIONS = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(1, 9)), min_size=2, max_size=12)


@given(batch=st.lists(COMPLETIONS, min_size=1, max_size=4))
def test_advantages_over_the_batch_are_those_of_a_naive_loop(batch: list[list[tuple[float, int]]]) -> None:
    """Each token has an advantage, and all of them together mean 0 and std 1: a long completion counts for more."""
    rewards = [np.array([reward for reward, _ in group], np.float32) for group in batch]
    lengths = [np.array([length for _, length in group]) for group in batch]
    for estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        tokens = []  # of each completion
        for group in batch:
            baseline = statistics.fmean(reward for reward, _ in group) if "baseline" in estimator else 0.0
            tokens += [[reward - baseline] * length for reward, length in group]
        flat = [value for completion in tokens for value in completion]
        mean, std = statistics.fmean(flat), statistics.pstdev(flat)
        actual = advantages(rewards, lengths, estimator)  # type: ignore[arg-type]
        assert [len(group) for group in actual] == [len(group) for group in batch]
        if std > 1e-3:  # else rounding decides
            expected = [(completion[0] - mean) / (std + 1e-6) for completion in tokens]
            np.testing.assert_allclose(np.concatenate(actual), expected, atol=2e-3, rtol=2e-3)


def test_overlong_answers_by_hand() -> None:
    lengths = np.array([1, 6, 7, 9, 10, 12], np.int32)
    assert overlong_penalty(lengths, max_tokens=10, buffer=4).tolist() == [0, 0, -0.25, -0.75, -1, -1]


@pytest.mark.parametrize("rewards", [[1.0], [], [1.0, math.nan], [math.inf, 0.0]])
def test_rewards_that_cannot_be_compared_are_errors(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(np.array(rewards, np.float32), "grpo")


def naive_ratio(token: dict[str, float], sequence: list[dict[str, float]], config: AlgorithmConfig) -> float:
    def log_ratio(t: dict[str, float]) -> float:
        return t["logprob"] - t["actor"] if config.old_policy == "actor" else 0.0

    if config.policy_loss == "gspo":
        return math.exp(statistics.fmean(log_ratio(t) for t in sequence))
    return math.exp(log_ratio(token))


def naive_advantage(advantage: float, rest: list[dict[str, float]], config: AlgorithmConfig) -> float:
    """Of the first token of the rest of a completion."""
    if config.kl_penalty == "loss":
        return advantage
    old = "actor" if config.old_policy == "actor" else "logprob"
    return advantage - config.kl_coef * sum(token[old] - token["reference"] for token in rest)


def is_masked(token: dict[str, float], truncated: bool, config: AlgorithmConfig) -> bool:
    if config.mask_truncated_completions and truncated:
        return True
    if config.importance_mask is None:
        return False
    low, high = config.importance_mask
    return not low <= math.exp(token["logprob"] - token["actor"]) <= high


def naive_loss(
    tokens: list[list[dict[str, float]]],
    advantages: list[float],
    truncated: list[bool],
    config: AlgorithmConfig,
    batch_tokens: int,
    batch_sequences: int,
) -> float:
    """The formula of learner.algorithms.losses, one token at a time."""
    total = 0.0
    for sequence, of_sequence, cut_off in zip(tokens, advantages, truncated, strict=True):
        if config.mask_truncated_completions and cut_off:
            continue
        for i, token in enumerate(sequence):
            advantage = naive_advantage(of_sequence, sequence[i:], config)
            p, actor = token["logprob"], token["actor"]
            ratio = naive_ratio(token, sequence, config)
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            value = -min(ratio * advantage, clipped * advantage)
            if config.policy_loss == "cispo":
                value = -clipped * advantage * p
            if config.clip_dual is not None and advantage < 0:
                value = min(value, -config.clip_dual * advantage)
            if config.importance_cap is not None:
                value *= min(math.exp(p - actor), config.importance_cap)
            if is_masked(token, cut_off, config):
                value = 0.0
            value -= config.entropy_coef * token["entropy"]
            m = token["reference"]
            if config.kl_penalty == "loss":
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
    AlgorithmConfig(),
    AlgorithmConfig(clip_low=0.1, clip_high=0.4, entropy_coef=0.05),
    AlgorithmConfig(aggregation="seq-mean-token-mean", kl_coef=0.3),
    AlgorithmConfig(aggregation="seq-mean-token-sum-norm", max_completion_tokens=9, advantage="dr_grpo"),
    AlgorithmConfig(old_policy="learner", importance_cap=1.5, entropy_coef=-0.1),
    AlgorithmConfig(old_policy="learner", aggregation="seq-mean-token-mean"),
    AlgorithmConfig(policy_loss="gspo", aggregation="seq-mean-token-mean", clip_low=0.05, clip_high=0.1, kl_coef=0.1),
    AlgorithmConfig(policy_loss="cispo", clip_low=1.0, clip_high=0.5, entropy_coef=0.01),
    AlgorithmConfig(clip_dual=1.5),
    AlgorithmConfig(kl_coef=0.2, kl_penalty="reward"),
    AlgorithmConfig(old_policy="learner", kl_coef=0.2, kl_penalty="reward", clip_dual=2.0),
    AlgorithmConfig(importance_mask=(0.5, 2.0)),
    AlgorithmConfig(old_policy="learner", importance_mask=(0.25, 1.5), importance_cap=1.2),
    AlgorithmConfig(mask_truncated_completions=True, entropy_coef=0.05, kl_coef=0.3, importance_mask=(0.5, 2.0)),
    AlgorithmConfig(mask_truncated_completions=True, aggregation="seq-mean-token-mean"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_metrics_are_those_of_a_naive_loop(config: AlgorithmConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, 4).tolist()
    names = ("logprob", "actor", "entropy", "reference")
    tokens = [[{name: float(rng.normal(-1, 0.7)) for name in names} for _ in range(n)] for n in lengths]
    advantages = rng.normal(size=4).tolist()
    truncated = [False, True, True, False]
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
        reference_logprobs=flat["reference"],
        truncated=torch.tensor(truncated),
    )
    expected = naive_loss(tokens, advantages, truncated, config, 31, 8)
    assert terms.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    clipped, masked = [], []
    for sequence, of_sequence, cut_off in zip(tokens, advantages, truncated, strict=True):
        for i, t in enumerate(sequence):
            advantage = naive_advantage(of_sequence, sequence[i:], config)
            ratio = naive_ratio(t, sequence, config)
            above, below = ratio > 1 + config.clip_high, ratio < 1 - config.clip_low
            beyond = config.clip_dual is not None and ratio > config.clip_dual
            one_sided = above if advantage > 0 else below or beyond
            clipped.append(float(above or below if config.policy_loss == "cispo" else one_sided))
            masked.append(float(is_masked(t, cut_off, config)))
    assert terms.clipped.tolist() == clipped
    assert terms.masked.tolist() == masked

    def divergences(p: str, q: str) -> list[float]:
        return [math.exp(t[q] - t[p]) - (t[q] - t[p]) - 1 for s in tokens for t in s]

    assert terms.mismatch_kl.tolist() == pytest.approx(divergences("actor", "logprob"), rel=1e-4, abs=1e-6)
    assert terms.reference_kl.tolist() == pytest.approx(divergences("logprob", "reference"), rel=1e-4, abs=1e-6)
    measured = (terms.clipped, terms.ratio, terms.mismatch_kl, terms.reference_kl, terms.masked)
    assert not any(values.requires_grad for values in measured)  # they would keep the graph of each pack


def test_the_gradient_of_gspo_is_that_of_its_sequence_level_objective() -> None:
    """Equation 5 of the paper by autograd: no token ratios in it at all."""
    generator = torch.Generator().manual_seed(0)
    lengths, advantages = [3, 1, 4], torch.tensor([1.0, -0.5, 0.25])
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    actor = -torch.rand(8, generator=generator)
    config = AlgorithmConfig(policy_loss="gspo", aggregation="seq-mean-token-mean", clip_low=0.3, clip_high=0.02)
    gradients = []
    for ours in (True, False):
        logprobs = (actor + 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1))).requires_grad_()
        if ours:
            policy_loss(logprobs, torch.zeros(8), actor, advantages, ids, BatchTotals(8, 3), config).loss.backward()
        else:
            ratios = torch.stack([part.mean().exp() for part in (logprobs - actor).split(lengths)])
            clipped = ratios.clamp(0.7, 1.02)
            (-torch.minimum(ratios * advantages, clipped * advantages).mean()).backward()
        assert logprobs.grad is not None
        gradients.append(logprobs.grad)
    torch.testing.assert_close(*gradients)
    assert (gradients[0] == 0).any()
    assert (gradients[0] != 0).any()


def test_no_token_loses_its_gradient_to_cispo() -> None:
    logprobs = torch.tensor([-0.1, -1.0, -3.0], requires_grad=True)
    config = AlgorithmConfig(policy_loss="cispo", clip_low=1.0, clip_high=0.5)
    actor = torch.tensor([-3.0, -1.0, -1.0])
    zeros, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    policy_loss(logprobs, zeros, actor, torch.tensor([2.0]), ids, BatchTotals(3, 1), config).loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), [-2 * 1.5 / 3, -2 / 3, -2 * math.exp(-2) / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_dual": 3.0, "policy_loss": "cispo"}, "clip_dual belongs to"),
        ({"policy_loss": "gspo"}, "needs aggregation: seq-mean-token-mean"),
        (
            {"advantage": "reinforce_plus_plus", "kl_coef": 0.1, "kl_penalty": "reward"},
            "kl_penalty: reward does not go with advantage: reinforce_plus_plus.*; use kl_penalty: loss",
        ),
        ({"importance_mask": [1.1, 2.0]}, "0 <= low <= 1 <= high"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        AlgorithmConfig(**settings)


RECIPES: dict[str, dict[str, Any]] = {
    "GRPO": {"advantage": "grpo", "aggregation": "seq-mean-token-mean"},
    "Dr. GRPO": {
        "advantage": "dr_grpo",
        "aggregation": "seq-mean-token-sum-norm",
        "max_completion_tokens": 1024,
    },
    "DAPO": {"advantage": "grpo", "aggregation": "token-mean", "clip_high": 0.28, "overlong_buffer": 256},
    "RLOO": {"advantage": "rloo", "old_policy": "learner"},
    "REINFORCE++": {"advantage": "reinforce_plus_plus", "aggregation": "token-mean"},
    "GSPO": {"policy_loss": "gspo", "aggregation": "seq-mean-token-mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "CISPO": {"policy_loss": "cispo", "aggregation": "token-mean", "clip_low": 1.0, "clip_high": 5.0},
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_are_settings_and_stand_in_the_table(name: str) -> None:
    AlgorithmConfig(**RECIPES[name])
    (line,) = [line for line in Path("docs/algorithms.md").read_text().splitlines() if line.startswith(f"| {name} |")]
    for key, value in RECIPES[name].items():
        assert f"{key}: {value}" in line


def test_the_gradient_of_old_policy_learner_is_reinforce() -> None:
    """Ratio 1 everywhere, gradient -A * grad(logprob), clipped or not."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    zeros, ids = torch.zeros(3), torch.tensor([0, 0, 1])
    config = AlgorithmConfig(old_policy="learner", clip_low=0.0, clip_high=0.0)
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
    policy_loss(logprobs, torch.zeros(2), actor, advantages, ids, BatchTotals(2, 2), AlgorithmConfig()).loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), [0.0, math.e / 2], rtol=1e-6)
    logprobs.grad.zero_()
    config = AlgorithmConfig(old_policy="learner", importance_cap=2.0)
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
        AlgorithmConfig(),
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
        AlgorithmConfig(**settings)


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
            AlgorithmConfig(kl_coef=0.1),
        )
