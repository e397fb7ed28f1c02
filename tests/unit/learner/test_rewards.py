"""Rewards: loading by path, keywords, and that a failure is never a number."""

import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from common.config import ConfigError
from learner.rewards import RewardError, RewardRunner, load_reward
from tests.fakes import make_completion, make_sample

MODULE = "rewards_of_a_test"


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    yield module
    del sys.modules[MODULE]


COMPLETIONS = [make_completion("g", i, "a") for i in range(3)]


def decode(ids: Any) -> str:
    return " ".join(map(str, ids))


def runner(function: Callable[..., Any], timeout_s: float = 10.0) -> RewardRunner:
    return RewardRunner(function, decode=decode, timeout_s=timeout_s, num_threads=1)


async def test_one_reward_per_completion_in_order() -> None:
    texts = [decode(c.token_ids.tolist()) for c in COMPLETIONS]

    def reward(*, completion: str, ground_truth: str, **_: Any) -> float:
        assert ground_truth == "4"
        return texts.index(completion) + 0.5

    rewards = await runner(reward).score(make_sample(4), COMPLETIONS)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [0.5, 1.5, 2.5]


async def test_a_function_gets_what_it_asks_for(module: types.ModuleType) -> None:
    seen: list[Any] = []

    def verl_style(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> bool:
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return True

    module.verl_style = verl_style  # type: ignore[attr-defined]
    sample = make_sample(4)
    sample.extra["extra_info"] = {"split": "train"}
    rewards = await runner(load_reward(f"{MODULE}:verl_style")).score(sample, COMPLETIONS[:1])
    assert rewards.tolist() == [1.0]
    assert seen == [("", decode(COMPLETIONS[0].token_ids.tolist()), "4", {"split": "train"})]


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (lambda **_: 1 / 0, "REWARD_RAISED"),
        (lambda **_: float("nan"), "REWARD_NOT_FINITE"),
        (lambda **_: np.float32("inf"), "REWARD_NOT_FINITE"),
        (lambda **_: "1", "REWARD_NOT_A_NUMBER"),
        (lambda **_: None, "REWARD_NOT_A_NUMBER"),
    ],
)
async def test_failures_raise(reward: Callable[..., Any], reason: str) -> None:
    with pytest.raises(RewardError) as caught:
        await runner(reward).score(make_sample(4), COMPLETIONS)
    assert caught.value.reason == reason
    assert "row 4, completion 0" in str(caught.value)


async def test_one_bad_completion_fails_the_group() -> None:
    def reward(*, token_ids: list[int], **_: Any) -> float:
        if token_ids == COMPLETIONS[2].token_ids.tolist():
            raise RuntimeError("judge is down")
        return 1.0

    with pytest.raises(RewardError, match="completion 2: RuntimeError: judge is down"):
        await runner(reward).score(make_sample(4), COMPLETIONS)


async def test_a_reward_that_hangs_costs_its_group_only() -> None:
    hang = threading.Event()

    def reward(*, ground_truth: str, **_: Any) -> float:
        if ground_truth == "1":
            hang.wait(30)
        return 2.0

    rewards = runner(reward, timeout_s=0.05)
    with pytest.raises(RewardError) as caught:
        await rewards.score(make_sample(1), COMPLETIONS)
    assert caught.value.reason == "REWARD_TIMEOUT"
    # Its only thread still hangs; another one has taken its place.
    assert (await rewards.score(make_sample(2), COMPLETIONS)).tolist() == [2.0, 2.0, 2.0]
    hang.set()
    rewards.close()


def test_exact_match() -> None:
    exact_match = load_reward("learner.rewards.exact_match:exact_match")
    assert exact_match(completion=" 7\n", ground_truth=7, images=()) == 1.0
    assert exact_match(completion="77", ground_truth="7") == 0.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nonsense", "write it as package.module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        (f"{MODULE}:missing", "has no 'missing'"),
        (f"{MODULE}:number", "is a int, not a function"),
        (f"{MODULE}:greedy", "wants an argument 'judge'"),
        (f"{MODULE}:later", "is a coroutine"),
    ],
)
def test_bad_paths_are_one_line(module: types.ModuleType, path: str, message: str) -> None:
    async def later(**_: Any) -> float:
        return 0.0

    def greedy(completion: str, judge: str) -> float:
        return 0.0

    module.__dict__.update(number=3, greedy=greedy, later=later)
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(path)
    assert "\n" not in str(caught.value)
