"""The policy as a whole, on one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.algorithms.losses import k3
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.batch.transport import encode_packs
from learner.config import LearnerConfig
from learner.distributed import join_ranks
from learner.model.logprobs import completion_logprobs
from learner.policy import Policy
from tests.unit.learner_math.groups import centred, mixed_groups, reference_logits


@pytest.mark.parametrize("fused", [False, True])
def test_the_kl_term_is_that_to_the_checkpoint_that_the_run_began_with(
    tmp_path: Path, reference_model: Any, hf_processor: Any, processor: PromptProcessor, fused: bool
) -> None:
    reference_model.save_pretrained(tmp_path)
    config = LearnerConfig.model_validate(
        {
            "model": {"path": tmp_path, "use_fused_kernels": fused},
            "data": {"train": "unused"},
            "trainer": {"total_steps": 10, "batch_prompts": 2},
            "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
            "algorithm": {"kl_coef": 0.1},
        }
    )
    groups = mixed_groups(processor)
    packs = pack_batch(groups, centred(groups), max_tokens=10_000, filler=processor.filler)
    with join_ranks("cpu") as ranks:
        policy = Policy(config, ranks)
        first = policy.step([encode_packs(packs[0])])
        assert first.reference_kl == pytest.approx(0.0, abs=1e-9)
        policy.step([encode_packs(packs[0])])
        (pack,) = packs[0]
        with torch.no_grad():
            now, _ = completion_logprobs(policy.model, pack, suppressed_token_ids=policy.placeholder_ids)
            rows = []
            for group in groups:
                for completion in group.completions:
                    logits = reference_logits(reference_model, hf_processor, group, completion).float()
                    logits[:, list(policy.placeholder_ids)] = -torch.inf
                    chosen = torch.from_numpy(completion.token_ids).long()[:, None]
                    rows.append(torch.log_softmax(logits, -1).gather(1, chosen).squeeze(1))
            began = torch.cat(rows)
        third = policy.step([encode_packs(packs[0])])
        assert third.reference_kl == pytest.approx(float(k3(began - now).mean()), rel=1e-3)
        assert third.reference_kl > 1e-4
