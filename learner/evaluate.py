"""Held-out rows: one greedy completion for each row, scored by the run's own reward, on the run's own actors.

With sampled completions also pass@k, the chance that one of k samples passes.

It goes beside the credits of training: nothing that is sampled here is trained on.
"""

import asyncio
import collections
import math
from dataclasses import dataclass, field, replace

from common.log import get_logger
from common.process.threads import to_own_thread
from common.types import SamplingParams
from learner.config import EvaluationConfig
from learner.rewards.base import RewardError, Rewards
from learner.rollouts.sampler import GroupFailed, Sampler, build_request
from learner.stopping import RunFailed
from learner.types import Dataset, Group, ProcessedPrompt, Processor, PromptSample, RewardParts

log = get_logger(__name__)

# Their images are in memory at the same time.
_MAX_ROWS_AT_ONCE = 512
# One is read while another goes through the processor. They have threads of their own: so many rows would keep the
# loop's threads from everybody else.
_PREPARED_AT_ONCE = 2
# Whose answers are kept to be read.
_MAX_KEPT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean reward over `num_rows` held-out rows, and the mean length of a completion in tokens."""

    accuracy: float
    num_rows: int
    mean_tokens: float
    pass_at_k: dict[int, float] = field(default_factory=dict)
    """k -> mean over the rows; empty without sampled completions."""
    failed: dict[str, int] = field(default_factory=dict, kw_only=True)
    """Reason -> rows without a score, which are not among `num_rows`."""
    reward_parts: tuple[RewardParts, ...] = field(default=(), kw_only=True)
    """Of the greedy completion of each row."""
    groups: tuple[Group, ...] = field(default=(), kw_only=True)
    """The greedy completions of the first rows, to be read, without images and other columns."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """To one row; `group` is kept of the first ones alone, for it has arrays as long as prompt and completion."""

    reward: float
    num_tokens: int
    reward_parts: RewardParts
    num_passed: int
    group: Group | None


class TooManyFailed(RunFailed):
    """So many rows have no score that those of the others would be another number."""


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k of the n samples, c of which passed, passed.

    The unbiased estimate of arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


async def evaluate(
    rows: Dataset,
    *,
    sampler: Sampler,
    rewards: Rewards,
    processor: Processor,
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
    turns = asyncio.Semaphore(_PREPARED_AT_ONCE)

    async def ask(row: int) -> _Answer | None:
        """None for a row that failed."""
        async with turns:
            sample, expected = await to_own_thread(f"evaluate-{row}", _prepare, rows, row, processor)

        async def answers(name: str, sampling: SamplingParams) -> Group:
            request = build_request(f"{group_prefix}.{name}{row}", sample, sampling)
            group = await sampler.sample(request, min_version=lambda: version, expected=expected)
            scores = await rewards.score(sample, group.completions)
            kept = replace(sample, images=(), image_bounds=(), extra={})
            told = (request.group_id, row, kept, expected, group.prompt, group.completions)
            return Group(*told, scores.rewards, scores.parts)

        try:
            answer = await answers("", greedy)
            num_passed = 0
            if sampled is not None:
                num_passed = int(((await answers("samples.", sampled)).rewards >= settings.pass_reward).sum())
        except (GroupFailed, RewardError) as error:
            log.warning("held-out row has no score", row=sample.row, reason=error.reason, error=str(error))
            failed[error.reason] += 1
            if failed.total() > settings.max_failed_share * len(rows):
                raise TooManyFailed(_too_many(sample, error, failed.total(), len(rows))) from error
            return None
        num_tokens = len(answer.completions[0].token_ids)
        kept = answer if row < _MAX_KEPT_ROWS else None
        return _Answer(float(answer.rewards[0]), num_tokens, answer.reward_parts, num_passed, kept)

    async def ask_in_turn() -> None:
        for row in in_turn:
            answered[row] = await ask(row)

    in_turn = iter(range(len(rows)))
    answered: list[_Answer | None] = [None] * len(rows)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask_in_turn()) for _ in range(min(_MAX_ROWS_AT_ONCE, len(rows)))]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others say the same of another row
    for task in tasks:
        task.result()  # raises if a row lost its slot because the fleet ends, which to a task group is no error
    told = [*filter(None, answered)]
    rates = {}
    if sampled is not None:
        rates = {k: sum(pass_at_k(sampled.n, each.num_passed, k) for each in told) / len(told) for k in settings.k}
    return Evaluation(
        sum(each.reward for each in told) / len(told),
        len(told),
        sum(each.num_tokens for each in told) / len(told),
        rates,
        failed=dict(failed),
        reward_parts=tuple(each.reward_parts for each in told),
        groups=tuple(each.group for each in told if each.group is not None),
    )


def _too_many(sample: PromptSample, error: GroupFailed | RewardError, num_failed: int, num_rows: int) -> str:
    return (
        f"held-out row {sample.row} has no score ({error.reason}: {error}), as {num_failed} of {num_rows} by now: more "
        "than evaluation.max_failed_share allows. A resumed run asks them again; mend the reward or the rows, or "
        "raise that share"
    )


def _prepare(rows: Dataset, row: int, processor: Processor) -> tuple[PromptSample, ProcessedPrompt]:
    """The row, and what its answers are held against, which needs no tensors."""
    sample = rows[row]
    return sample, replace(processor.process(sample), media={})
