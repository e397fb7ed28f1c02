"""Batches come packed, one step ahead."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from common.types import FloatArray
from learner.batch.balance import ModelCost
from learner.batch.pack_bytes import decode_packs
from learner.batch.packing import pack_batch
from learner.batch.processing import PromptProcessor
from learner.config import LearnerConfig
from learner.data.ledger import Ledger
from learner.rollouts.buffer import GroupBuffer
from learner.training.feed import Batch, BatchFeed, OtherModelError
from learner.types import Group
from tests.helpers.fakes import until
from tests.helpers.groups import centred, mixed_groups

PLACEHOLDERS = (262, 263)
TOTAL_STEPS = 2


class Rollouts:
    """In place of `Control`: four groups for each version, of the sequence numbers that are next."""

    def __init__(self, processor: PromptProcessor, groups: list[Group]) -> None:
        self.processor = processor
        self.ledger = Ledger(0, 100)
        self.taken: list[int] = []
        self.refused = threading.Event()
        self._groups = groups
        self._buffer = GroupBuffer(max_groups=8)

    def sample(self, *, slow: tuple[int, ...] = ()) -> None:
        """Four groups are handed out; all but `slow`, places among them, are finished."""
        for place, group in enumerate(self._groups):
            sequence = self.ledger.next_sequence()
            if place not in slow:
                self._buffer.put(dataclasses.replace(group, sequence=sequence))

    def take_batch(self, version: int, accept: Callable[[Sequence[Group]], bool]) -> list[Group]:
        def asked(groups: Sequence[Group]) -> bool:
            accepted = accept(groups)
            if not accepted:
                self.refused.set()
            return accepted

        groups = self._buffer.take(4, version=0, max_staleness=8, timeout_s=30, accept=asked)
        self.taken.append(version)
        return groups

    def wait_for(self, _version: int) -> None:
        self._buffer.look_again()

    def finish(self, groups: Sequence[Group]) -> None:
        self.ledger.mark_trained([group.sequence for group in groups])


def make_feed(
    rollouts: Any,
    is_stopping: Callable[[], bool] = lambda: False,
    *,
    other: Any = None,
    num_ranks: int = 1,
    **trainer: object,
) -> BatchFeed:
    """`other`: sections of the configuration beside `trainer`."""
    config = LearnerConfig.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused"},
            "trainer": {"total_steps": TOTAL_STEPS, "batch_prompts": 4, **trainer},
            **(other or {}),
        }
    )
    return BatchFeed(
        config,
        rollouts,
        rollouts.ledger,
        num_ranks=num_ranks,
        placeholder_ids=PLACEHOLDERS,
        cost=ModelCost(),
        is_stopping=is_stopping,
    )


@pytest.fixture
def groups(processor: PromptProcessor) -> list[Group]:
    return [
        dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, suppressed_token_ids=PLACEHOLDERS))
        for group in mixed_groups(processor)
    ]


def batch_of(feed: BatchFeed, version: int) -> Batch:
    batch = feed.next(version)
    assert batch is not None
    return batch


def sequences(batch: Batch) -> list[int]:
    return [group.sequence for group in batch.groups]


async def test_the_next_batch_is_taken_before_it_is_asked_for(processor: PromptProcessor, groups: list[Group]) -> None:
    rollouts = Rollouts(processor, groups)
    rollouts.sample()
    rollouts.sample()
    feed = make_feed(rollouts)
    first = batch_of(feed, 0)
    assert sequences(first) == [0, 1, 2, 3]
    await until(lambda: rollouts.taken == [0, 1], pause_s=0.001)
    rollouts.finish(first.groups)
    assert sequences(batch_of(feed, 1)) == [4, 5, 6, 7]


def test_a_slow_group_is_not_pushed_back_while_there_is_time(processor: PromptProcessor, groups: list[Group]) -> None:
    """Its batch waits for it until the trainer has nothing to do."""
    rollouts = Rollouts(processor, groups)
    rollouts.sample()
    feed = make_feed(rollouts)
    first = batch_of(feed, 0)
    rollouts.sample(slow=(1,))
    rollouts.sample(slow=(1, 2, 3))  # four are there, of which one was begun after the slow one
    assert rollouts.refused.wait(30)
    assert rollouts.taken == [0]
    rollouts.finish(first.groups)
    assert sequences(batch_of(feed, 1)) == [4, 6, 7, 8]


def test_mini_batches_are_packed_one_by_one(processor: PromptProcessor, groups: list[Group]) -> None:
    rollouts = Rollouts(processor, groups)
    rollouts.sample()
    batch = batch_of(make_feed(rollouts, mini_batch_prompts=2), 0)
    assert [[group.sequence for group in mini_batch] for mini_batch in batch.mini_batches] == [[0, 1], [2, 3]]
    values: list[FloatArray] = centred(groups)
    for i, (part,) in enumerate(batch.parts):
        chosen = slice(2 * i, 2 * i + 2)
        (expected,) = pack_batch(groups[chosen], values[chosen], max_tokens=16384, filler=processor.filler)
        packs = decode_packs(part)
        assert [pack.input_ids.tolist() for pack in packs] == [pack.input_ids.tolist() for pack in expected]
        assert [pack.num_sequences for pack in packs] == [pack.num_sequences for pack in expected]


def test_ranks_that_share_sequences_get_the_same_packs_of_twice_the_budget(
    processor: PromptProcessor, groups: list[Group]
) -> None:
    rollouts = Rollouts(processor, groups)
    rollouts.sample()
    feed = make_feed(rollouts, num_ranks=4, sequence_parallel_size=2, max_tokens_per_micro_batch=20)
    ((first, its_neighbour, third, the_last),) = batch_of(feed, 0).parts
    packs = pack_batch(groups, centred(groups), num_ranks=2, max_tokens=40, filler=processor.filler)
    expected = [[pack.input_ids.tolist() for pack in of_rank] for of_rank in packs]
    assert [[pack.input_ids.tolist() for pack in decode_packs(part)] for part in (first, third)] == expected
    assert torch.equal(first, its_neighbour)
    assert torch.equal(third, the_last)


def test_long_completions_lose_some_of_their_reward(processor: PromptProcessor, groups: list[Group]) -> None:
    """By hand for lengths (2, 5, 1), (4, 4), (7, 1, 3, 2), (1, 1): from 3 tokens on, half a point for each."""
    rollouts = Rollouts(processor, groups)
    rollouts.sample()
    algorithm = {"advantage": "dr_grpo", "overlong_buffer": 4, "overlong_penalty": 2.0}
    batch = batch_of(make_feed(rollouts, other={"algorithm": algorithm, "rollout": {"max_tokens": 7}}), 0)
    lost = [[0, 1, 0], [0.5, 0.5], [2, 0, 0, 0], [0, 0]]
    shaped = [group.rewards - np.array(values) for group, values in zip(groups, lost, strict=True)]
    ((part,),) = batch.parts
    trained = sorted(value for pack in decode_packs(part) for value in pack.advantages.tolist())
    expected = sorted(value for rewards in shaped for value in (rewards - rewards.mean()).tolist())
    assert trained == pytest.approx(expected, abs=1e-6)
    assert [group.rewards.tolist() for group in batch.groups] == [group.rewards.tolist() for group in groups]
    assert batch.overlong_penalties is not None
    assert [of_group.tolist() for of_group in batch.overlong_penalties] == lost


def test_another_model_is_noticed(processor: PromptProcessor) -> None:
    """The actors' placeholder ids are not the learner's."""
    rollouts = Rollouts(processor, mixed_groups(processor))
    rollouts.sample()
    feed = make_feed(rollouts)
    with pytest.raises(OtherModelError, match="masks the placeholder ids"):
        feed.next(0)


def test_what_breaks_the_rollouts_is_raised_when_its_batch_is_asked_for(
    processor: PromptProcessor, groups: list[Group]
) -> None:
    class Broken(Rollouts):
        def take_batch(self, version: int, accept: Callable[[Sequence[Group]], bool]) -> list[Group]:
            if version:
                raise RuntimeError("all actors are gone")
            return super().take_batch(version, accept)

    rollouts = Broken(processor, groups)
    rollouts.sample()
    feed = make_feed(rollouts)
    feed.next(0)
    with pytest.raises(RuntimeError, match="all actors are gone"):
        feed.next(1)


def test_nobody_waits_for_a_batch_once_the_run_stops(processor: PromptProcessor, groups: list[Group]) -> None:
    rollouts = Rollouts(processor, groups)
    rollouts.sample(slow=(1,))
    assert make_feed(rollouts, is_stopping=lambda: True).next(0) is None
