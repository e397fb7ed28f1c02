"""The training loop, on every rank.

    take_batch -> advantages -> pack -> scatter -> train_step -> snapshot -> publish -> (checkpoint) -> (evaluate)
     rank 0       rank 0        rank 0   all        all           all         rank 0     all             rank 0

| waits for | unblocked by |
|---|---|
| `take_batch` | enough finished groups, fresh enough |
| collectives of a step | the other ranks |
| `evaluate` | the held-out completions |

It never waits for the wire of a weight update: `publish` hands over a copy and returns. With `max_staleness = 0` the
next batch cannot start before its actors have the new version, so the same loop is then synchronous.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from common.log import get_logger
from common.types import FloatArray
from learner.algorithms.advantages import advantages
from learner.algorithms.shaping import overlong_penalty
from learner.batch.packing import pack_batch
from learner.batch.transport import encode_packs
from learner.config import LearnerConfig
from learner.control import Control
from learner.distributed import Ranks
from learner.ledger import Ledger
from learner.policy import Policy
from learner.report import Reporter
from learner.step import StepStats, merge_stats
from learner.types import Group

log = get_logger(__name__)

T = TypeVar("T")

# Steps in a row without an update, for a gradient that is not finite, that end the run.
_MAX_SKIPPED_STEPS = 3


class ParityError(RuntimeError):
    """Learner and actor disagree about the probability of what the current policy sampled."""


@dataclass(frozen=True, slots=True)
class RankZero:
    """What only rank 0 has: the way to the actors, the ledger of the prompts, and somebody to tell."""

    control: Control
    ledger: Ledger
    reporter: Reporter


class Trainer:
    """Runs the loop on one rank."""

    def __init__(
        self, config: LearnerConfig, ranks: Ranks, policy: Policy, run_dir: Path, zero: RankZero | None
    ) -> None:
        """`zero` is None on the other ranks."""
        self._config = config
        self._ranks = ranks
        self._policy = policy
        self._run_dir = run_dir
        self._zero = zero
        self._num_skipped = 0

    def run(self) -> Path:
        """Train to the last step; the directory of the final export."""
        settings = self._config.trainer
        first = self._policy.snapshot()
        if self._zero is not None and first is not None:
            self._zero.control.publish(first)
        if self._policy.version == 0:
            self._evaluate()
        if self._zero is not None:
            self._zero.reporter.training_begins()
        while self._policy.version < settings.total_steps:
            self._step()
            is_last = self._policy.version == settings.total_steps
            try:
                if is_last or _is_due(self._policy.version, settings.eval_every):
                    self._evaluate()
            finally:  # an evaluation that fails ends the run, and must not cost its steps
                if is_last or _is_due(self._policy.version, settings.checkpoint_every):
                    self._checkpoint()
        export = self._policy.export(self._run_dir / "export")
        self._policy.finish()
        return export

    def _step(self) -> None:
        started_at = time.monotonic()
        groups = self._zero.control.take_batch(self._policy.version) if self._zero is not None else []
        wait_s = time.monotonic() - started_at
        updates = self._policy.step(self._pack(groups))
        stats = merge_stats([update for of_mini_batch in updates for update in of_mini_batch])
        snapshot = self._policy.snapshot()
        if self._zero is not None and snapshot is not None:
            control = self._zero.control
            skipped = [
                group
                for mini_batch, of_mini_batch in zip(self._mini_batches(groups), updates, strict=True)
                if all(update.skipped for update in of_mini_batch)
                for group in mini_batch
            ]
            control.finish_step(groups, self._policy.version, snapshot, skipped=skipped)
            self._zero.reporter.step(self._policy.version, groups, stats, control.stats(), wait_s=wait_s)
        self._stop_if_wrong(stats)

    def _mini_batches(self, batch: Sequence[T]) -> list[Sequence[T]]:
        """The batch, or what belongs to its groups, in parts of one optimizer step each."""
        size = self._config.trainer.mini_batch_prompts or len(batch)
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _pack(self, groups: Sequence[Group]) -> list[list[torch.Tensor]] | None:
        """Rank 0: each mini-batch as one flat tensor for each rank."""
        if self._zero is None:
            return None
        for group in groups:
            if group.prompt.suppressed_token_ids != self._policy.placeholder_ids:
                raise ParityError(
                    f"the actor masks the placeholder ids {group.prompt.suppressed_token_ids}, the learner "
                    f"{self._policy.placeholder_ids}: they run different models"
                )
        values = advantages([self._shaped_rewards(group) for group in groups], self._config.algorithm.advantage)
        num_copies = self._config.trainer.sequence_parallel_size
        encoded: list[list[torch.Tensor]] = []
        for mini_batch, of_mini_batch in zip(self._mini_batches(groups), self._mini_batches(values), strict=True):
            packs = pack_batch(
                mini_batch,
                of_mini_batch,
                num_ranks=self._ranks.num_ranks // num_copies,
                max_tokens=self._config.trainer.max_tokens_per_micro_batch * num_copies,
                filler=self._zero.control.processor.filler,
                cost=self._policy.cost,
            )
            parts = [encode_packs(of_group) for of_group in packs]
            encoded.append([part for part in parts for _ in range(num_copies)])  # neighbours share their sequences
        return encoded

    def _shaped_rewards(self, group: Group) -> FloatArray:
        settings = self._config.algorithm
        if not settings.overlong_buffer:
            return group.rewards
        lengths = np.array([len(completion.token_ids) for completion in group.completions])
        punishment = overlong_penalty(lengths, self._config.rollout.max_tokens, settings.overlong_buffer)
        return group.rewards + np.float32(settings.overlong_penalty) * punishment

    def _stop_if_wrong(self, stats: StepStats) -> None:
        step = self._policy.version - 1
        limit = self._config.trainer.max_parity_diff
        if limit is not None and not stats.parity_max_abs_diff <= limit:  # NaN is no parity either
            raise ParityError(
                f"step {step}: a logprob of learner and actor differs by {stats.parity_max_abs_diff:.2e}, more than "
                f"trainer.max_parity_diff ({limit:.0e}): what is trained is not what was sampled"
            )
        self._num_skipped = self._num_skipped + 1 if stats.skipped else 0
        if self._num_skipped == _MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"step {step}: loss or gradient of {self._num_skipped} steps in a row was not finite; lower "
                "optimizer.lr, or look at rewards and data"
            )

    def _evaluate(self) -> None:
        if self._zero is None:
            return
        reporter = self._zero.reporter
        reporter.phase("evaluating")
        result = self._zero.control.evaluate(self._policy.version)
        if result is not None:
            reporter.accuracy(self._policy.version, result)
        reporter.phase("training")

    def _checkpoint(self) -> None:
        state = {}
        if self._zero is not None:
            state = {"ledger": self._zero.ledger.to_dict(), "progress": self._zero.reporter.state()}
        path = self._policy.save(self._run_dir, state)
        log.info("checkpoint", path=str(path))


def _is_due(version: int, every: int) -> bool:
    return every > 0 and version % every == 0
