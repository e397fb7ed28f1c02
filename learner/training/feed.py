"""Batches for the trainer, taken and packed in a thread while the batch before trains.

    buffer --take--> groups --advantages--> --pack--> one flat tensor for each rank and mini-batch

Packing takes as long as a good part of a step where completions are many; the devices need not wait for it. So the host
holds the tensors of two batches.

A batch is taken ahead only if no group that was begun before one of it is still being sampled. Otherwise quick groups
would push slow ones back until they are too stale; the trainer takes what there is once it has nothing to do.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from common.types import FloatArray, IntArray
from learner.algorithms.advantages import advantages
from learner.algorithms.shaping import overlong_penalty
from learner.batch.balance import ModelCost
from learner.batch.pack_bytes import encode_packs
from learner.batch.packing import pack_batch
from learner.config import LearnerConfig
from learner.control import Control
from learner.data.ledger import Ledger
from learner.stopping import RunFailed
from learner.types import Group

# How often the trainer looks, while it waits, whether the run should end.
_LOOK_S = 0.2

T = TypeVar("T")


class OtherModelError(RunFailed):
    """The actors run another model than the learner."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups of one step, in mini-batches of one optimizer step each; `parts`: each as a tensor for each rank."""

    mini_batches: list[Sequence[Group]]
    parts: list[list[torch.Tensor]]
    taken_at: float
    """When its groups were there, on the monotonic clock."""
    overlong_penalties: list[FloatArray] | None = None
    """What each completion of a group has lost of its reward for its length; None without `overlong_buffer`."""

    @property
    def groups(self) -> list[Group]:
        """All of them."""
        return [group for mini_batch in self.mini_batches for group in mini_batch]


class BatchFeed:
    """Of rank 0. `next` gives the batch of one version after the other; what went wrong on the way is raised there."""

    def __init__(
        self,
        config: LearnerConfig,
        control: Control,
        ledger: Ledger,
        *,
        num_ranks: int,
        placeholder_ids: tuple[int, ...],
        cost: ModelCost,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`placeholder_ids`: what the model cannot sample. `cost`: of its layers, so that ranks get equal work.

        Once it `is_stopping`, nobody waits for a batch any more.
        """
        self._config = config
        self._control = control
        self._ledger = ledger
        self._num_ranks = num_ranks
        self._placeholder_ids = placeholder_ids
        self._cost = cost
        self._is_stopping = is_stopping
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._asked = -1  # the version for which the trainer waits, or has waited
        self._in_training: frozenset[int] = frozenset()  # sequence numbers
        self._coming: Future[Batch] | None = None

    def next(self, version: int) -> Batch | None:
        """Wait for the batch that is trained at `version`; the one after it is begun. The one before is trained.

        None: the run is to stop, and the batch was not there yet.
        """
        self._asked = version
        if self._coming is None:
            self._coming = self._thread.submit(self._make, version)
        self._control.wait_for(version)
        while not wait([self._coming], timeout=_LOOK_S).done:
            if self._is_stopping():
                return None
        batch = self._coming.result()
        self._in_training = frozenset(group.sequence for group in batch.groups)
        self._coming = None
        if version + 1 < self._config.trainer.num_steps:
            self._coming = self._thread.submit(self._make, version + 1)
        return batch

    def _make(self, version: int) -> Batch:
        groups = self._control.take_batch(version, lambda groups: self._asked >= version or self._are_next(groups))
        taken_at = time.monotonic()
        self._check(groups)
        lengths = [np.array([len(completion.token_ids) for completion in group.completions]) for group in groups]
        rewards = [group.rewards for group in groups]
        penalties = self._overlong_penalties(lengths)
        if penalties is not None:
            rewards = [of_group - lost for of_group, lost in zip(rewards, penalties, strict=True)]
        values = advantages(rewards, lengths, self._config.algorithm.advantage)
        mini_batches = self._split(groups)
        parts = [self._pack(*pair) for pair in zip(mini_batches, self._split(values), strict=True)]
        return Batch(mini_batches, parts, taken_at, penalties)

    def _are_next(self, groups: Sequence[Group]) -> bool:
        """Whether these were begun before all others that are not trained yet."""
        sequences = {group.sequence for group in groups}
        others = self._ledger.in_flight - sequences - self._in_training
        return max(sequences) < min(others, default=math.inf)

    def _split(self, batch: Sequence[T]) -> list[Sequence[T]]:
        size = self._config.trainer.mini_batch_prompts or len(batch)
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _check(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if group.prompt.suppressed_token_ids != self._placeholder_ids:
                raise OtherModelError(
                    f"the actor masks the placeholder ids {group.prompt.suppressed_token_ids}, the learner "
                    f"{self._placeholder_ids}: they run different models"
                )

    def _pack(self, groups: Sequence[Group], values: Sequence[FloatArray]) -> list[torch.Tensor]:
        """One flat tensor for each rank."""
        trainer = self._config.trainer
        num_copies = trainer.sequence_parallel_size
        packs = pack_batch(
            groups,
            values,
            num_ranks=self._num_ranks // num_copies,
            max_tokens=trainer.max_tokens_per_micro_batch * num_copies,
            filler=self._control.processor.filler,
            cost=self._cost,
        )
        parts = [encode_packs(of_group) for of_group in packs]
        return [part for part in parts for _ in range(num_copies)]  # neighbours share their sequences

    def _overlong_penalties(self, lengths: Sequence[IntArray]) -> list[FloatArray] | None:
        settings = self._config.algorithm
        if not settings.overlong_buffer:
            return None
        weight, longest = np.float32(settings.overlong_penalty), self._config.rollout.max_tokens
        return [-weight * overlong_penalty(of_group, longest, settings.overlong_buffer) for of_group in lengths]
