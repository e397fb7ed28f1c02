"""Held-out accuracy: one greedy completion for each row, scored by the run's own reward, on the run's own actors.

It goes beside the credits of training: nothing that is sampled here is trained on.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.types import SamplingParams
from learner.batch.processing import PromptProcessor
from learner.rewards.runner import RewardRunner
from learner.rollouts.sampler import Sampler, build_request
from learner.types import PromptSample


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
    rewards: RewardRunner,
    processor: PromptProcessor,
    sampling: SamplingParams,
    group_prefix: str,
    version: int,
) -> Evaluation:
    """Ask for every row under a policy of at least `version`.

    Raises what sampling and rewards raise: an evaluation with holes in it would be a wrong number.
    """
    samples = await asyncio.to_thread(lambda: [rows[row] for row in range(len(rows))])
    expected = await asyncio.to_thread(lambda: [processor.process(sample) for sample in samples])
    requests = [build_request(f"{group_prefix}.{i}", sample, sampling) for i, sample in enumerate(samples)]
    sampled = await sampler.sample_many(requests, min_version=version, expected=expected)
    scores: Sequence[float] = [
        float((await rewards.score(sample, group.completions))[0])
        for sample, group in zip(samples, sampled, strict=True)
    ]
    num_tokens = sum(len(group.completions[0].token_ids) for group in sampled)
    return Evaluation(sum(scores) / len(scores), len(scores), num_tokens / len(scores))
