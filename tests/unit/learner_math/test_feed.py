"""Batches come packed, one step ahead."""

import dataclasses
import threading
from typing import Any

import pytest

from common.types import FloatArray
from learner.batch.balance import ModelCost
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.batch.transport import decode_packs
from learner.config import LearnerConfig
from learner.feed import BatchFeed, OtherModelError
from learner.types import Group
from tests.unit.learner_math.groups import centred, mixed_groups

PLACEHOLDERS = (262, 263)
TOTAL_STEPS = 2


class Rollouts:
    """In place of `Control`: gives the same groups for each version that it is let give."""

    def __init__(self, processor: PromptProcessor, groups: list[Group]) -> None:
        self.processor = processor
        self.asked: list[int] = []
        self.last = threading.Event()
        self._groups = groups

    def take_batch(self, version: int) -> list[Group]:
        self.asked.append(version)
        if version == TOTAL_STEPS - 1:
            self.last.set()
        return self._groups


def make_feed(rollouts: Any, **trainer: object) -> BatchFeed:
    config = LearnerConfig.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "trainer": {"total_steps": TOTAL_STEPS, "batch_prompts": 4, **trainer},
        }
    )
    return BatchFeed(config, rollouts, num_ranks=1, placeholder_ids=PLACEHOLDERS, cost=ModelCost())


@pytest.fixture
def groups(processor: PromptProcessor) -> list[Group]:
    return [
        dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, suppressed_token_ids=PLACEHOLDERS))
        for group in mixed_groups(processor)
    ]


def test_the_next_batch_is_taken_before_it_is_asked_for(processor: PromptProcessor, groups: list[Group]) -> None:
    rollouts = Rollouts(processor, groups)
    feed = make_feed(rollouts)
    assert feed.next(0).groups == groups
    assert rollouts.last.wait(30)
    assert feed.next(1).groups == groups
    assert rollouts.asked == [0, 1]


def test_mini_batches_are_packed_one_by_one(processor: PromptProcessor, groups: list[Group]) -> None:
    batch = make_feed(Rollouts(processor, groups), mini_batch_prompts=2).next(0)
    assert [list(mini_batch) for mini_batch in batch.mini_batches] == [groups[:2], groups[2:]]
    values: list[FloatArray] = centred(groups)
    for i, (part,) in enumerate(batch.parts):
        chosen = slice(2 * i, 2 * i + 2)
        (expected,) = pack_batch(groups[chosen], values[chosen], max_tokens=16384, filler=processor.filler)
        packs = decode_packs(part)
        assert [pack.input_ids.tolist() for pack in packs] == [pack.input_ids.tolist() for pack in expected]
        assert [pack.num_sequences for pack in packs] == [pack.num_sequences for pack in expected]


def test_another_model_is_noticed(processor: PromptProcessor) -> None:
    """The actors' placeholder ids are not the learner's."""
    feed = make_feed(Rollouts(processor, mixed_groups(processor)))
    with pytest.raises(OtherModelError, match="masks the placeholder ids"):
        feed.next(0)


def test_what_breaks_the_rollouts_is_raised_when_its_batch_is_asked_for(
    processor: PromptProcessor, groups: list[Group]
) -> None:
    class Broken(Rollouts):
        def take_batch(self, version: int) -> list[Group]:
            if version:
                raise RuntimeError("all actors are gone")
            return super().take_batch(version)

    feed = make_feed(Broken(processor, groups))
    assert feed.next(0).groups == groups
    with pytest.raises(RuntimeError, match="all actors are gone"):
        feed.next(1)
