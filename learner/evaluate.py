"""Held-out accuracy: one greedy completion for each row, scored by the run's own reward, on the run's own actors.

It goes beside the credits of training: nothing that is sampled here is trained on.
"""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from common.types import SamplingParams
from learner.batch.processing import PromptProcessor
from learner.rewards.base import Rewards
from learner.rollouts.sampler import Sampler, build_request
from learner.types import ProcessedPrompt, PromptSample

# Their images and tensors are in memory at the same time.
_MAX_ROWS_AT_ONCE = 512


class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> PromptSample: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean reward over `num_rows` held-out rows, and the mean length of a completion in tokens."""

    accuracy: float
    num_rows: int
    mean_tokens: float


async def evaluate(
    rows: Rows,
    *,
    sampler: Sampler,
    rewards: Rewards,
    processor: PromptProcessor,
    sampling: SamplingParams,
    group_prefix: str,
    version: int,
) -> Evaluation:
    """Ask for every row under a policy of at least `version`.

    Raises what sampling and rewards raise: an evaluation with holes in it would be a wrong number.
    """
    room = asyncio.Semaphore(_MAX_ROWS_AT_ONCE)

    async def ask(row: int) -> tuple[float, int]:
        async with room:
            sample, expected = await asyncio.to_thread(_prepare, rows, row, processor)
            sampled = await sampler.sample(
                build_request(f"{group_prefix}.{row}", sample, sampling), min_version=lambda: version, expected=expected
            )
            (score,) = await rewards.score(sample, sampled.completions)
            return float(score), len(sampled.completions[0].token_ids)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(row)) for row in range(len(rows))]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others say the same of another row
    scores, lengths = zip(*(task.result() for task in tasks), strict=True)
    return Evaluation(sum(scores) / len(scores), len(scores), sum(lengths) / len(lengths))


def _prepare(rows: Rows, row: int, processor: PromptProcessor) -> tuple[PromptSample, ProcessedPrompt]:
    sample = rows[row]
    return sample, processor.process(sample)
