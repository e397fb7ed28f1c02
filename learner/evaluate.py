"""Held-out accuracy: one greedy completion for each row, scored by the run's own reward, on the run's own actors.

With sampled completions also pass@k, the chance that one of k samples passes.

It goes beside the credits of training: nothing that is sampled here is trained on.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.threads import to_own_thread
from common.types import Completion, FloatArray, SamplingParams
from learner.batch.processing import PromptProcessor
from learner.config import EvaluationConfig
from learner.rewards.base import Rewards
from learner.rollouts.sampler import Sampler, build_request
from learner.types import ProcessedPrompt, PromptSample

# Their images are in memory at the same time.
_MAX_ROWS_AT_ONCE = 512
# One is read while another goes through the processor. They have threads of their own: so many rows would keep the
# loop's threads from everybody else.
_PREPARED_AT_ONCE = 2


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
    pass_at_k: dict[int, float] = field(default_factory=dict)
    """k -> mean over the rows; empty without sampled completions."""


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k of the n samples, c of which passed, passed.

    The unbiased estimate of arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


async def evaluate(
    rows: Rows,
    *,
    sampler: Sampler,
    rewards: Rewards,
    processor: PromptProcessor,
    greedy: SamplingParams,
    sampled: SamplingParams | None,
    settings: EvaluationConfig,
    group_prefix: str,
    version: int,
) -> Evaluation:
    """Ask for every row under a policy of at least `version`.

    Args:
        rows: the held-out rows.
        sampler: of the run.
        rewards: of the run.
        processor: of the policy.
        greedy: for the accuracy, one completion.
        sampled: for pass@k, several; None leaves it out.
        settings: what counts as passed, and which k.
        group_prefix: of the groups' names.
        version: of the policy.

    Raises what sampling and rewards raise: an evaluation with holes in it would be a wrong number.
    """
    room = asyncio.Semaphore(_MAX_ROWS_AT_ONCE)
    turns = asyncio.Semaphore(_PREPARED_AT_ONCE)

    async def ask(row: int) -> tuple[float, int, int]:
        """(greedy reward, its tokens, sampled completions that passed)."""
        async with room:
            async with turns:
                sample, expected = await to_own_thread(f"evaluate-{row}", _prepare, rows, row, processor)

            async def answers(name: str, sampling: SamplingParams) -> tuple[FloatArray, Sequence[Completion]]:
                request = build_request(f"{group_prefix}.{name}{row}", sample, sampling)
                group = await sampler.sample(request, min_version=lambda: version, expected=expected)
                return await rewards.score(sample, group.completions), group.completions

            scores, (completion,) = await answers("", greedy)
            passed = 0
            if sampled is not None:
                sampled_scores, _ = await answers("samples.", sampled)
                passed = int((sampled_scores >= settings.pass_reward).sum())
            return float(scores[0]), len(completion.token_ids), passed

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(row)) for row in range(len(rows))]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others say the same of another row
    scores, lengths, passed = zip(*(task.result() for task in tasks), strict=True)
    rates = {}
    if sampled is not None:
        rates = {k: sum(pass_at_k(sampled.n, count, k) for count in passed) / len(passed) for k in settings.k}
    return Evaluation(sum(scores) / len(scores), len(scores), sum(lengths) / len(lengths), rates)


def _prepare(rows: Rows, row: int, processor: PromptProcessor) -> tuple[PromptSample, ProcessedPrompt]:
    """The row, and what its answers are held against, which needs no tensors."""
    sample = rows[row]
    return sample, replace(processor.process(sample), media={})
