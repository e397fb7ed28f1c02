"""Held-out accuracy: one greedy completion for each row, scored by the run's own reward, on the run's own actors.

With sampled completions also pass@k, the chance that one of k samples passes.

It goes beside the credits of training: nothing that is sampled here is trained on.
"""

import asyncio
import collections
import math
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.log import get_logger
from common.threads import to_own_thread
from common.types import SamplingParams
from learner.batch.processing import PromptProcessor
from learner.config import EvaluationConfig
from learner.rewards.base import RewardError, Rewards
from learner.rollouts.sampler import GroupFailed, Sampler, build_request
from learner.types import Group, ProcessedPrompt, PromptSample

log = get_logger(__name__)

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
    failed: dict[str, int] = field(default_factory=dict)
    """Reason -> rows without a score, which are not among `num_rows`."""
    groups: tuple[Group, ...] = ()
    """Of the greedy completions, row by row, without images and other columns."""


class TooManyFailed(RuntimeError):  # noqa: N818 - says what happened
    """So many rows have no score that those of the others would be another number."""


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
        settings: what counts as passed, which k, and how many rows may fail.
        group_prefix: of the groups' names.
        version: of the policy.

    A row whose reward or group fails is left out of every mean, and counted. Raises `TooManyFailed`, and what else
    sampling raises.
    """
    failed: collections.Counter[str] = collections.Counter()
    room = asyncio.Semaphore(_MAX_ROWS_AT_ONCE)
    turns = asyncio.Semaphore(_PREPARED_AT_ONCE)

    async def ask(row: int) -> tuple[Group, int] | None:
        """(the greedy completion, sampled completions that passed); None for a row that failed."""
        async with room:
            async with turns:
                sample, expected = await to_own_thread(f"evaluate-{row}", _prepare, rows, row, processor)

            async def answers(name: str, sampling: SamplingParams) -> Group:
                request = build_request(f"{group_prefix}.{name}{row}", sample, sampling)
                group = await sampler.sample(request, min_version=lambda: version, expected=expected)
                scores = await rewards.score(sample, group.completions)
                kept = replace(sample, images=(), extra={})  # all rows are in memory in the end
                told = (request.group_id, row, kept, expected, group.prompt, group.completions)
                return Group(*told, scores.rewards, scores.parts)

            try:
                answer = await answers("", greedy)
                passed = 0
                if sampled is not None:
                    passed = int(((await answers("samples.", sampled)).rewards >= settings.pass_reward).sum())
            except (GroupFailed, RewardError) as error:
                log.warning("held-out row has no score", row=sample.row, reason=error.reason, error=str(error))
                failed[error.reason] += 1
                if failed.total() > settings.max_failed_share * len(rows):
                    raise TooManyFailed(_too_many(sample, error, failed.total(), len(rows))) from error
                return None
            return answer, passed

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(row)) for row in range(len(rows))]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others say the same of another row
    groups, passed = zip(*filter(None, (task.result() for task in tasks)), strict=True)
    scores = [float(group.rewards[0]) for group in groups]
    lengths = [len(group.completions[0].token_ids) for group in groups]
    rates = {}
    if sampled is not None:
        rates = {k: sum(pass_at_k(sampled.n, count, k) for count in passed) / len(passed) for k in settings.k}
    mean_tokens = sum(lengths) / len(lengths)
    return Evaluation(sum(scores) / len(scores), len(scores), mean_tokens, rates, dict(failed), groups)


def _too_many(sample: PromptSample, error: GroupFailed | RewardError, num_failed: int, num_rows: int) -> str:
    return (
        f"held-out row {sample.row} has no score ({error.reason}: {error}), as {num_failed} of {num_rows} by now: more "
        "than evaluation.max_failed_share. A resumed run asks them again; mend the reward or the rows, or raise it"
    )


def _prepare(rows: Rows, row: int, processor: PromptProcessor) -> tuple[PromptSample, ProcessedPrompt]:
    """The row, and what its answers are held against, which needs no tensors."""
    sample = rows[row]
    return sample, replace(processor.process(sample), media={})
