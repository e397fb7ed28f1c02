"""Held-out evaluation: greedy accuracy and pass@k."""

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.types import Completion, RolloutRequest, SamplingParams
from learner.config import EvaluationConfig
from learner.evaluate import Evaluation, TooManyFailed, evaluate, pass_at_k
from learner.rewards.base import RewardError
from learner.rollouts.sampler import GroupFailed
from learner.types import ProcessedPrompt, PromptSample, Scores
from tests.helpers.fakes import FakeProcessor, make_completion, make_sample

ROWS = 4


class Rows:
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> Any:
        return make_sample(row)


class CountingSampler:
    """Answers at once and remembers what it was asked. The k-th group's completions have k tokens."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []

    async def sample(self, request: RolloutRequest, *, min_version: Any, expected: Any) -> Any:
        assert min_version() == 7
        assert expected.media == {}  # nothing looks at it, and it is large
        self.requests.append(request)
        n, spans = request.sampling.n, ((7, len(self.requests)),)
        completions = [make_completion(request.group_id, i, "a", spans) for i in range(n)]
        return SimpleNamespace(prompt=None, completions=completions)


class RowsOftenPass:
    """The greedy completion of row r is worth r / 4; the first r of its sampled ones pass."""

    async def score(self, sample: Any, completions: Sequence[Completion]) -> Scores:
        values = [1.0 if i < sample.row else 0.25 for i in range(len(completions))]
        values = [sample.row / ROWS] if len(completions) == 1 else values
        return Scores(np.array(values, np.float32), {"judge": values})


class GatedProcessor(FakeProcessor):
    """Goes on with a row once the gate is open. Its prompts have tensors."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.gate = threading.Event()

    def process(self, sample: PromptSample) -> ProcessedPrompt:
        self.num_begun += 1
        self._loop.call_soon_threadsafe(self.begun.set)
        self.gate.wait()
        return dataclasses.replace(super().process(sample), media={"pixel_values": torch.zeros(1)})


async def run(
    settings: EvaluationConfig, processor: Any = None, rewards: Any = None, sampler: Any = None
) -> tuple[Evaluation, list[RolloutRequest]]:
    sampler = sampler or CountingSampler()
    rewards = rewards or RowsOftenPass()
    processor = processor or FakeProcessor()
    result = await evaluate(
        Rows(),
        sampler=sampler,
        rewards=rewards,
        processor=processor,
        greedy=SamplingParams(n=1, temperature=0.0),
        sampled=SamplingParams(n=settings.samples, temperature=0.7) if settings.samples else None,
        settings=settings,
        group_prefix="r.held-out.7",
        version=7,
    )
    return result, sampler.requests


async def test_greedy_accuracy_alone_asks_once_per_row() -> None:
    result, requests = await run(EvaluationConfig())
    assert result.accuracy == pytest.approx((0 + 1 + 2 + 3) / 16)
    assert (result.num_rows, result.mean_tokens, result.pass_at_k) == (ROWS, (1 + 2 + 3 + 4) / 4, {})
    assert sorted(request.group_id for request in requests) == [f"r.held-out.7.{row}" for row in range(ROWS)]
    told = [(group.sample.row, group.completions[0].index, group.reward_parts) for group in result.groups]
    assert told == [(row, 0, {"judge": [row / ROWS]}) for row in range(ROWS)]


async def test_so_many_rows_are_asked_at_once_and_the_others_are_no_tasks_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 rows, tasks would hold the learner's loop up for seconds."""

    class Watching(CountingSampler):
        async def sample(self, *arguments: Any, **options: Any) -> Any:
            num_tasks.append(len(asyncio.all_tasks()) - before)
            await asyncio.sleep(0)
            return await super().sample(*arguments, **options)

    num_tasks: list[int] = []
    before = len(asyncio.all_tasks())
    monkeypatch.setattr("learner.evaluate._MAX_ROWS_AT_ONCE", 2)
    result, requests = await run(EvaluationConfig(), sampler=Watching())
    assert sorted(request.group_id for request in requests) == [f"r.held-out.7.{row}" for row in range(ROWS)]
    assert result.num_rows == ROWS
    assert max(num_tasks) <= 2


async def test_answers_of_the_first_rows_are_kept_and_parts_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.evaluate._MAX_KEPT_ROWS", 2)
    result, _ = await run(EvaluationConfig())
    assert [group.sample.row for group in result.groups] == [0, 1]
    assert result.reward_parts == tuple({"judge": [row / ROWS]} for row in range(ROWS))


async def test_pass_at_k_over_the_rows() -> None:
    result, requests = await run(EvaluationConfig(samples=4, k=(1, 2, 4)))
    assert result.accuracy == pytest.approx((0 + 1 + 2 + 3) / 16)
    # By hand for n = 4 and c = 0, 1, 2, 3: pass@1 = c / 4; pass@2 = 0, 3/6, 5/6, 1; pass@4 = 0, 1, 1, 1.
    assert result.pass_at_k == pytest.approx({1: 6 / 16, 2: (0 + 1 / 2 + 5 / 6 + 1) / 4, 4: 3 / 4})
    assert len({request.group_id for request in requests}) == 2 * ROWS
    assert {request.sampling.temperature for request in requests} == {0.0, 0.7}


class RowsOftenFail(RowsOftenPass):
    """The reward of the last rows fails: of the last one always, of the one before with sampled completions."""

    async def score(self, sample: Any, completions: Sequence[Completion]) -> Scores:
        if sample.row == ROWS - 1 or (sample.row == ROWS - 2 and len(completions) > 1):
            raise RewardError("REWARD_RAISED", f"row {sample.row}: KeyError: 'x' (f)")
        return await super().score(sample, completions)


async def test_a_failed_row_is_counted_and_is_no_value() -> None:
    result, _ = await run(EvaluationConfig(max_failed_share=0.25), rewards=RowsOftenFail())
    assert result.accuracy == pytest.approx((0 + 1 + 2) / 12)
    assert (result.num_rows, result.failed) == (ROWS - 1, {"REWARD_RAISED": 1})
    settings = EvaluationConfig(samples=4, k=(1,), max_failed_share=0.5)
    result, _ = await run(settings, rewards=RowsOftenFail())
    assert (result.accuracy, result.pass_at_k) == (pytest.approx((0 + 1) / 8), {1: pytest.approx((0 + 1 / 4) / 2)})
    assert (result.num_rows, result.failed) == (ROWS - 2, {"REWARD_RAISED": 2})


async def test_too_many_failed_rows_end_the_evaluation() -> None:
    message = (
        r"^held-out row 3 has no score \(REWARD_RAISED: row 3: .*1 of 4 by now: more than evaluation.max_failed_sh"
    )
    for settings in (EvaluationConfig(), EvaluationConfig(max_failed_share=0.24)):
        with pytest.raises(TooManyFailed, match=message):
            await run(settings, rewards=RowsOftenFail())


async def test_a_group_that_no_actor_takes_is_a_failed_row() -> None:
    class Refusing(CountingSampler):
        async def sample(self, request: RolloutRequest, *, min_version: Any, expected: Any) -> Any:
            if request.group_id.endswith(".0"):
                raise GroupFailed("INVALID_REQUEST", "prompt: too long")
            return await super().sample(request, min_version=min_version, expected=expected)

    result, _ = await run(EvaluationConfig(max_failed_share=0.25), sampler=Refusing())
    assert (result.accuracy, result.failed) == (pytest.approx((1 + 2 + 3) / 12), {"INVALID_REQUEST": 1})


@pytest.mark.parametrize("row", [0, ROWS - 1, None])
async def test_rows_that_lose_their_slots_leave_no_score_of_the_others(
    row: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fleet ends, and cancels who waits: for every row, or for one of them."""
    monkeypatch.setattr("learner.evaluate._MAX_ROWS_AT_ONCE", 2)

    class Ending(CountingSampler):
        async def sample(self, request: RolloutRequest, **options: Any) -> Any:
            if row is None or request.group_id.endswith(f".{row}"):
                raise asyncio.CancelledError
            return await super().sample(request, **options)

    with pytest.raises(asyncio.CancelledError):
        await run(EvaluationConfig(), sampler=Ending())


async def test_what_passes_is_a_setting() -> None:
    result, _ = await run(EvaluationConfig(samples=3, k=(1,), pass_reward=0.2))
    assert result.pass_at_k == {1: 1.0}


async def test_rows_that_are_being_processed_keep_no_thread_from_others() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    processor = GatedProcessor()
    evaluating = asyncio.create_task(run(EvaluationConfig(), processor))
    try:
        async with asyncio.timeout(20):
            await processor.begun.wait()
            await asyncio.to_thread(lambda: None)
    finally:
        processor.gate.set()
    result, _ = await evaluating
    assert result.num_rows == ROWS


async def test_an_evaluation_that_is_given_up_leaves_no_rows_to_be_processed() -> None:
    processor = GatedProcessor()
    evaluating = asyncio.create_task(run(EvaluationConfig(), processor))
    await processor.begun.wait()
    evaluating.cancel()
    await asyncio.wait([evaluating])
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("evaluate")]
    processor.gate.set()
    for thread in threads:
        thread.join(10)
    assert threads
    assert processor.num_begun < ROWS


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_the_estimate_is_the_share_of_all_choices_with_a_pass(case: tuple[int, int, int]) -> None:
    n, c, k = case
    choices = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"samples": 4, "k": [8]}, "k goes up to 8, but there are 4"), ({"k": [2]}, "needs samples")],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EvaluationConfig.model_validate(settings)
