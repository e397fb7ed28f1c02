import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import structlog
import torch
from torch import nn
from transformers import get_scheduler

from common.types import FinishReason
from learner.batch.packing import PackedBatch, pack_batch
from learner.batch.processing import PromptProcessor
from learner.config.algorithm import AlgorithmConfig
from learner.config.optimizer import OptimizerConfig
from learner.model.load import freeze, load_policy, model_cost, prepare_policy
from learner.model.logprobs import completion_logprobs
from learner.model.optimizer import build_optimizer, learning_rate
from learner.training.step import StepStats, clip_gradients, train_step
from learner.types import Group
from learner.weights.snapshot import Snapshotter
from tests.helpers.groups import SUPPRESSED, centred, mixed_groups, reference_logprobs

LOSS = AlgorithmConfig(entropy_coef=0.01, aggregation="seq-mean-token-mean", clip_high=1000.0, clip_low=1.0)
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.01)


def packs(processor: PromptProcessor, max_tokens: int = 10_000) -> list[PackedBatch]:
    groups = mixed_groups(processor)
    return pack_batch(groups, centred(groups), max_tokens=max_tokens, filler=processor.filler)[0]


def step(policy: Any, batches: list[PackedBatch], num: int = 1, **options: Any) -> StepStats:
    # Plain SGD: Adam divides by the size of the gradient, and so makes much of rounding where that is nearly zero.
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    options = {"policy_version": 0} | options
    return [train_step(policy, optimizer, batches, LOSS, **options) for _ in range(num)][-1]


def test_accumulated_micro_batches_are_one_batch(make_policy: Callable[[], Any], processor: PromptProcessor) -> None:
    whole, parts = packs(processor), packs(processor, max_tokens=45)
    assert (len(whole), len(parts)) == (1, 6)
    one, many = make_policy(), make_policy()
    stats_one, stats_many = step(one, whole, 2), step(many, parts, 2)
    assert stats_one.grad_norm == pytest.approx(stats_many.grad_norm, rel=1e-4)
    for name in (
        "loss",
        "entropy",
        "ratio_mean",
        "mismatch_kl",
        "clip_fraction",
        "parity_max_abs_diff",
        "parity_mean_abs_diff",
    ):
        assert getattr(stats_one, name) == pytest.approx(getattr(stats_many, name), rel=1e-4, abs=1e-7), name
    assert (
        (stats_one.num_tokens, stats_one.num_sequences) == (stats_many.num_tokens, stats_many.num_sequences) == (31, 11)
    )
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_step_makes_rewarded_completions_likelier(make_policy: Callable[[], Any], processor: PromptProcessor) -> None:
    policy, batches = make_policy(), packs(processor)
    first = step(policy, batches)
    second = step(policy, batches)
    assert second.loss < first.loss
    assert not first.skipped


def test_parity_counts_tokens_of_the_current_version_only(
    make_policy: Callable[[], Any], reference_model: Any, hf_processor: Any, processor: PromptProcessor
) -> None:
    groups = mixed_groups(processor)
    [[pack]] = pack_batch(groups, centred(groups), filler=processor.filler)
    with torch.no_grad():
        expected = torch.cat([c for g in reference_logprobs(reference_model, hf_processor, groups) for c in g])
    pack.versions[:20] = 7
    pack.actor_logprobs.copy_(expected)
    pack.actor_logprobs[3] += 0.25
    pack.actor_logprobs[25] += 99.0  # of another version
    stats = train_step(make_policy(), build_optimizer(make_policy(), OPTIMIZER), [pack], LOSS, policy_version=7)
    assert stats.parity_tokens == 20
    assert stats.parity_max_abs_diff == pytest.approx(0.25, abs=1e-4)
    assert stats.parity_mean_abs_diff == pytest.approx(0.25 / 20, abs=1e-5)


def test_parity_is_that_of_the_policy_before_the_batch(
    make_policy: Callable[[], Any], processor: PromptProcessor
) -> None:
    """Not of the parameters, which other mini-batches have changed since."""
    [pack] = packs(processor)
    pack.versions[:20] = 7
    old = pack.actor_logprobs.clone()
    old[3] += 0.5
    old[25] = math.nan  # of another version
    stats = step(make_policy(), [replace(pack, old_logprobs=old)], policy_version=7)
    assert (stats.parity_tokens, stats.parity_max_abs_diff) == (20, pytest.approx(0.5))
    assert stats.parity_mean_abs_diff == pytest.approx(0.5 / 20)


@pytest.mark.parametrize("field", ["advantages", "actor_logprobs"])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_loud(
    make_policy: Callable[[], Any], processor: PromptProcessor, field: str
) -> None:
    policy, [pack] = make_policy(), packs(processor)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    getattr(pack, field)[0] = math.nan
    optimizer = build_optimizer(policy, OPTIMIZER)
    with structlog.testing.capture_logs() as logs:
        stats = train_step(policy, optimizer, [pack], LOSS, policy_version=0)
    assert (stats.skipped, stats.num_updates, stats.num_skipped) == (True, 0, 1)
    assert math.isnan(stats.loss)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [
        ("error", "loss or gradient is not finite: step skipped")
    ]
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert not optimizer.state
    getattr(pack, field)[0] = 1.0
    again = train_step(policy, optimizer, [pack], LOSS, policy_version=0)
    assert (again.skipped, again.num_updates, again.num_skipped) == (False, 1, 0)


def test_completions_that_were_cut_off_have_no_gradient(
    make_policy: Callable[[], Any], processor: PromptProcessor
) -> None:
    groups = mixed_groups(processor)
    config = AlgorithmConfig(entropy_coef=0.01, mask_truncated_completions=True)

    def trained(*cut_off: int) -> tuple[Any, StepStats]:
        """With the completions of these groups cut off."""
        now = [_cut_off(group) if i in cut_off else group for i, group in enumerate(groups)]
        [batches] = pack_batch(now, centred(groups), filler=processor.filler)
        policy = make_policy()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        return policy, train_step(policy, optimizer, batches, config, policy_version=0)

    assert trained()[1].masked_fraction == 0
    _, some = trained(0)
    assert some.masked_fraction == pytest.approx(8 / 31)
    assert some.grad_norm > 0
    policy, none = trained(0, 1, 2, 3)
    assert (none.masked_fraction, none.loss, none.grad_norm, none.skipped) == (1, 0, 0, False)
    assert none.parity_tokens == 31
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), make_policy().parameters(), strict=True))


def _cut_off(group: Group) -> Group:
    completions = (replace(each, finish_reason=FinishReason.LENGTH) for each in group.completions)
    return replace(group, completions=tuple(completions))


def test_gradients_are_clipped_to_the_norm() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(clip_gradients(model, 1.0)) == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [[pytest.approx(0.6, rel=1e-5), 0.0]]
    assert model.bias.grad.tolist() == [pytest.approx(0.8, rel=1e-5)]
    assert float(clip_gradients(model, 10.0)) == pytest.approx(1.0, rel=1e-5)
    assert model.bias.grad.tolist() == [pytest.approx(0.8, rel=1e-5)]


@pytest.mark.parametrize(
    ("frozen", "modules"),
    [
        (["vision_tower"], ("model.visual",)),
        (["projector"], ("model.visual.merger",)),
        (["language_model"], ("model.language_model", "lm_head")),
        (["vision_tower", "projector"], ("model.visual", "model.visual.merger")),
    ],
)
def test_frozen_parts_stay_as_they_are(
    model_dir: Any, processor: PromptProcessor, frozen: Any, modules: tuple[str, ...]
) -> None:
    """For 20 steps of AdamW, whose state and weight decay would move them too."""
    policy, report = load_policy(model_dir, frozen=frozen)
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}
    still = {name for name in before if any(name.startswith(f"{module}.") for module in modules)}
    assert report.frozen == modules
    assert report.num_frozen == sum(before[name].numel() for name in still)
    assert report.num_trainable + report.num_frozen == sum(p.numel() for p in policy.parameters())
    optimizer = build_optimizer(policy, OPTIMIZER)
    batches = packs(processor)
    forward = partial(completion_logprobs, suppressed_token_ids=SUPPRESSED)
    for _ in range(20):
        train_step(policy, optimizer, batches, LOSS, policy_version=0, forward=forward)
    for name, value in policy.named_parameters():
        assert torch.equal(value, before[name]) == (name in still), name
        assert (name in still) == (value not in optimizer.state), name
    # What an update sends: all that trains, and nothing else.
    snapshot = Snapshotter(policy, [], is_sender=True, bucket_bytes=2**20).take(1)
    assert snapshot is not None
    in_checkpoint = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        for name in before.keys() - still
    }
    assert {parameter.name for parameter in snapshot.update(full=False)[0].parameters} == in_checkpoint


def test_a_frozen_part_gets_no_gradient(model_dir: Any, processor: PromptProcessor) -> None:
    policy, _ = load_policy(model_dir, frozen=["vision_tower"])
    (batch,) = packs(processor)
    logprobs, _ = completion_logprobs(policy, batch)
    logprobs.sum().backward()
    assert all((value.grad is None) == name.startswith("model.visual.") for name, value in policy.named_parameters())


def test_freezing_nothing_or_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze_vision_tower found nothing to freeze in Sequential"):
        freeze(nn.Sequential(nn.Linear(2, 2)), ["vision_tower"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(nn.ModuleDict({"visual": nn.Linear(2, 2)}), ["vision_tower"])


def test_a_model_costs_what_its_parameters_are(make_policy: Callable[[], Any]) -> None:
    model = make_policy()
    vision = sum(p.numel() for name, p in model.named_parameters() if name.startswith("model.visual."))
    layers = sum(p.numel() for name, p in model.named_parameters() if ".language_model.layers." in name)
    cost = model_cost(model)
    assert cost.hidden_size == 128
    assert cost.pixel_value == pytest.approx(vision / layers / 1176, rel=1e-2)  # norms are left out here


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint: config\.json is missing"):
        load_policy(tmp_path)


def test_rotary_frequencies_stay_float32_in_bfloat16(model_dir: Any) -> None:
    half, full = load_policy(model_dir, dtype=torch.bfloat16)[0], load_policy(model_dir)[0]
    assert half.lm_head.weight.dtype == torch.bfloat16
    frequencies = {name: buffer for name, buffer in full.named_buffers() if "inv_freq" in name}
    assert any("visual" in name for name in frequencies)
    assert any("language_model" in name for name in frequencies)
    for name, buffer in frequencies.items():
        assert torch.equal(dict(half.named_buffers())[name], buffer), name
    assert half.training
    prepare_policy(half)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.82, 0.64, 0.46, 0.28]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.775, 0.325, 0.1, 0.1]),
    ],
)
def test_learning_rates_by_hand(schedule: Any, expected: list[float]) -> None:
    falls = {} if schedule == "constant" else {"min_lr_ratio": 0.1}
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=3, **falls)
    total = 6 if schedule == "cosine" else 8  # thirds of a half circle: cos 60 degrees is 1/2
    assert [learning_rate(step, total, config) / 2 for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_fall_as_in_transformers_and_no_step_has_none(schedule: Any, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=8)
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=warmup)
    ours = [learning_rate(step, 8, config) for step in range(8)]
    assert ours[warmup:] == pytest.approx([peer.lr_lambdas[0](step) for step in range(warmup, 8)])
    assert min(ours) > 0
