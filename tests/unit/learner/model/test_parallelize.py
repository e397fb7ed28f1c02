"""FSDP2 around the policy, in a world of one rank."""

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.model import attention
from learner.model.logprobs import completion_logprobs
from learner.model.parallelize import parallelize
from learner.training.distributed import join_ranks
from tests.helpers.groups import centred, mixed_groups


def test_masks_are_made_once_for_a_forward_in_mixed_precision_too(
    make_policy: Callable[[], Any], processor: PromptProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by each layer anew, after FSDP2 has cast the layer's arguments."""
    groups = mixed_groups(processor)
    ((pack,),) = pack_batch(groups, centred(groups), max_tokens=10_000, filler=processor.filler)
    make = MagicMock(wraps=attention._mask)
    monkeypatch.setattr(attention, "_mask", make)
    made: list[int] = []
    with join_ranks("cpu") as ranks:
        for compute_dtype in (None, torch.bfloat16):
            make.reset_mock()
            model = make_policy()
            parallelize(model, ranks.mesh, compute_dtype=compute_dtype)
            completion_logprobs(model, pack)
            made.append(make.call_count)
    layout = attention.packed_layout(pack.row_lengths.tolist(), pack.branch_ids)
    assert made == [sum(not block.causal for block in layout.blocks)] * 2
    assert made[0] > 0
