from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.types import Completion, FinishReason, VersionSpan
from learner.algorithms.losses import BatchTotals, policy_loss
from learner.batch.packing import PackedBatch, Row, pack, pack_batch
from learner.batch.processing import PromptProcessor
from learner.config.algorithm import AlgorithmConfig
from learner.model import fused_logprobs as fused_module
from learner.model import logprobs as logprobs_module
from learner.model.attention import NAME
from learner.model.load import load_policy
from learner.model.logprobs import check_fused, completion_logprobs, token_logprobs
from learner.types import Group, ProcessedPrompt
from tests.helpers.families import build
from tests.helpers.groups import centred, mixed_groups, reference_logits, reference_logprobs

LOSS = AlgorithmConfig(entropy_coef=0.01, aggregation="seq-mean-token-mean")


def one_pack(processor: PromptProcessor, groups: list[Group], share_prefix: bool) -> PackedBatch:
    [[pack]] = pack_batch(
        groups, centred(groups), max_tokens=10_000, share_prefix=share_prefix, filler=processor.filler
    )
    return pack


@pytest.mark.parametrize("share_prefix", [True, False])
def test_packed_logprobs_are_those_of_transformers(
    make_policy: Callable[[], Any],
    reference_model: Any,
    hf_processor: Any,
    processor: PromptProcessor,
    share_prefix: bool,
) -> None:
    groups = mixed_groups(processor)
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(make_policy(), one_pack(processor, groups, share_prefix))
        expected = torch.cat([c for g in reference_logprobs(reference_model, hf_processor, groups) for c in g])
        all_logprobs = torch.cat(
            [
                torch.log_softmax(reference_logits(reference_model, hf_processor, g, c), -1)
                for g in groups
                for c in g.completions
            ]
        )
    assert expected.std() > 0.3  # a uniform model would agree with anything
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, -(all_logprobs.exp() * all_logprobs).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_packed_loss_and_gradients_are_those_of_a_padded_batch(
    make_policy: Callable[[], Any],
    reference_model: Any,
    hf_processor: Any,
    processor: PromptProcessor,
    share_prefix: bool,
) -> None:
    groups = mixed_groups(processor)
    policy, pack = make_policy(), one_pack(processor, groups, share_prefix)
    totals = BatchTotals(len(pack.targets), pack.num_sequences)
    loss = _loss(pack, *completion_logprobs(policy, pack), totals)
    loss.backward()

    reference_model.zero_grad()
    reference_loss = _loss(pack, *_padded_logprobs(reference_model, groups), totals)
    reference_loss.backward()

    torch.testing.assert_close(loss, reference_loss, atol=1e-6, rtol=1e-5)
    expected = dict(reference_model.named_parameters())
    assert sum(int(p.grad.abs().sum() > 0) for p in expected.values()) == len(expected)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-3)


def _loss(pack: PackedBatch, logprobs: Tensor, entropy: Tensor, totals: BatchTotals) -> Tensor:
    return policy_loss(logprobs, entropy, pack.actor_logprobs, pack.advantages, pack.sequence_ids, totals, LOSS).loss


def _padded_logprobs(model: Any, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """The classic way: one padded row with an attention mask for each completion, prompts and images repeated."""
    sequences = [(g, c) for g in groups for c in g.completions]
    longest = max(len(g.processed.input_ids) + len(c.token_ids) for g, c in sequences)
    ids, mask, types, pixels, grids = [], [], [], [], []
    for g, c in sequences:
        row = torch.cat([torch.from_numpy(g.processed.input_ids), torch.from_numpy(c.token_ids)]).long()
        missing = longest - len(row)
        ids.append(torch.nn.functional.pad(row, (0, missing)))
        mask.append(torch.nn.functional.pad(torch.ones_like(row), (0, missing)))
        types.append((ids[-1] == 262).int())
        if g.processed.media:
            pixels.append(g.processed.media["pixel_values"])
            grids.append(g.processed.media["image_grid_thw"])
    output = model(
        input_ids=torch.stack(ids),
        attention_mask=torch.stack(mask),
        mm_token_type_ids=torch.stack(types),
        pixel_values=torch.cat(pixels),
        image_grid_thw=torch.cat(grids),
        use_cache=False,
    )
    results = []
    for row, (g, c) in zip(output.logits, sequences, strict=True):
        start = len(g.processed.input_ids)
        all_logprobs = torch.log_softmax(row[start - 1 : start - 1 + len(c.token_ids)], -1)
        chosen = all_logprobs[torch.arange(len(c.token_ids)), torch.from_numpy(c.token_ids).long()]
        results.append((chosen, -(all_logprobs.exp() * all_logprobs).sum(-1)))
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


def test_temperature_and_suppressed_ids_give_the_distribution_that_was_sampled() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 9.0], [0.5, 0.5, -1.0, 4.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([2, 0]), 0.5, (3,))
    for row, target in ((0, 2), (1, 0)):
        weights = (logits.detach()[row, :3] / 0.5).exp()
        p = weights / weights.sum()
        assert logprobs[row].item() == pytest.approx(p[target].log().item(), abs=1e-6)
        assert entropy[row].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad[:, 3].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(logits.grad).all())


def test_logits_in_pieces_give_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11), torch.randint(0, 11, (7,))
    results = []
    for limit in (2**26, 3 * 11):
        monkeypatch.setattr(logprobs_module, "_MAX_LOGIT_ELEMENTS", limit)
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs(leaf, targets, 0.7, (1,))
        (logprobs.sum() + 2 * entropy.sum()).backward()
        results.append((logprobs, entropy, leaf.grad))
    for whole, pieces in zip(*results, strict=True):
        assert torch.equal(whole, pieces)


def test_fused_logprobs_are_the_plain_ones(
    make_policy: Callable[[], Any], processor: PromptProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_module, "_MAX_ELEMENTS_CPU", 3 * 320)  # several slices
    pack = one_pack(processor, mixed_groups(processor), True)
    results: list[Any] = []
    for fused in (False, True):
        policy = make_policy()
        check_fused(policy)
        logprobs, entropy = completion_logprobs(policy, pack, temperature=0.7, suppressed_token_ids=(5,), fused=fused)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        assert isinstance(policy.lm_head, torch.nn.Linear)
        results.append((logprobs, entropy, {name: value.grad for name, value in policy.named_parameters()}))
    (plain, plain_entropy, gradients), (fused, fused_entropy, fused_gradients) = results
    torch.testing.assert_close((fused, fused_entropy), (plain, plain_entropy), atol=1e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_model_that_does_more_with_its_logits_is_not_fused(make_policy: Callable[[], Any]) -> None:
    policy = make_policy()
    policy.config.get_text_config().final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="it has final_logit_softcapping; set it to false"):
        check_fused(policy)
    policy.config.get_text_config().final_logit_softcapping = None
    policy.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="it has no linear lm_head"):
        check_fused(policy)


def test_as_many_tokens_as_targets(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of a model that gives the logits of all tokens, whatever it is asked for."""
    model, _ = load_policy(build("minicpm_v", tmp_path_factory.mktemp("model")))
    prompt_ids = np.arange(10, 22, dtype=np.int32)
    prompt = ProcessedPrompt(prompt_ids, np.arange(12)[None], 12, {}, (), ())

    def packed(num_completions: int) -> PackedBatch:
        spans = (VersionSpan(0, 0, 5),)
        completions = tuple(
            Completion(
                f"t{i}",
                i,
                np.arange(30 + i, 35 + i, dtype=np.int32),
                np.zeros(5, np.float32),
                FinishReason.STOP,
                spans,
            )
            for i in range(num_completions)
        )
        return pack([Row(prompt, completions, (1.0,) * num_completions)])

    few, many = packed(11), packed(12)
    assert (len(few.input_ids), len(few.targets)) == (56, 55)
    assert (len(many.input_ids), len(many.targets)) == (60, 60)
    with torch.no_grad():
        expected, _ = completion_logprobs(model, few)
        found, _ = completion_logprobs(model, many)
    torch.testing.assert_close(found[:55], expected, atol=1e-5, rtol=0)


def test_filler_image_gives_the_vision_tower_a_gradient_of_exactly_zero(
    make_policy: Callable[[], Any], processor: PromptProcessor
) -> None:
    text_only = mixed_groups(processor)[1:2]
    policy, pack = make_policy(), one_pack(processor, text_only, True)
    assert pack.media["image_grid_thw"].tolist() == [[1, 4, 4]]
    logprobs, _ = completion_logprobs(policy, pack)
    logprobs.sum().backward()
    for name, parameter in policy.named_parameters():
        if ".visual." in name:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    [[without]] = pack_batch(text_only, centred(text_only), filler=None)
    alone, _ = completion_logprobs(policy, without)
    torch.testing.assert_close(logprobs, alone, atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_nothing(
    model_dir: Any, make_policy: Callable[[], Any], processor: PromptProcessor
) -> None:
    from learner.model.load import load_policy
    from tests.helpers.enlarged import enlarge

    pack = one_pack(processor, mixed_groups(processor), True)
    plain, checkpointed = make_policy(), enlarge(load_policy(model_dir, gradient_checkpointing=True)[0])
    assert checkpointed.model.language_model.layers[0].gradient_checkpointing
    assert checkpointed.config.get_text_config()._attn_implementation == NAME
    for policy in (plain, checkpointed):
        logprobs, entropy = completion_logprobs(policy, pack)
        (logprobs.sum() + entropy.sum()).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-5)
