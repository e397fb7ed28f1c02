"""Reward processes: what hangs or dies costs its group and nothing else, and nothing outlives the learner."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from structlog.testing import capture_logs

from common.types import FloatArray
from learner.rewards import RewardError, RewardRunner
from tests.helpers.fakes import make_completion, make_sample, until
from tests.helpers.launched import Launched, is_alive, launching

COMPLETIONS = [make_completion("g", i, "a") for i in range(3)]


@contextlib.contextmanager
def running(*names: str, weights: Sequence[float] = (), timeout_s: float = 20.0) -> Iterator[RewardRunner]:
    """One process, for functions of `tests.helpers.reward_functions`. Texts are "x", "xx", "xxx"."""
    texts = {bytes(completion.token_ids): "x" * (completion.index + 1) for completion in COMPLETIONS}
    rewards = RewardRunner(
        [f"tests.helpers.reward_functions:{name}" for name in names],
        weights,
        decode=lambda ids: texts[bytes(np.array(ids, np.int32))],
        timeout_s=timeout_s,
        num_processes=1,
    )
    try:
        yield rewards
    finally:
        rewards.close()


async def score(rewards: RewardRunner, ground_truth: object = "") -> FloatArray:
    sample = dataclasses.replace(make_sample(4), ground_truth=ground_truth)
    return (await rewards.score(sample, COMPLETIONS)).rewards


async def process_id(rewards: RewardRunner) -> int:
    return int((await score(rewards))[0])


async def test_the_weighted_sum_comes_back_in_order() -> None:
    with running("length", "is_light", weights=[0.5, 10]) as rewards:
        values = await score(rewards)
    assert values.dtype == np.float32
    assert values.tolist() == [10.5, 11.0, 11.5]


async def test_what_each_function_said_comes_back_by_name() -> None:
    with running("length", "is_light", weights=[0.5, 10]) as rewards:
        scores = await rewards.score(make_sample(4), COMPLETIONS)
    prefix = "tests.helpers.reward_functions:"
    assert scores.parts == {f"{prefix}length": [1.0, 2.0, 3.0], f"{prefix}is_light": [1.0, 1.0, 1.0]}


async def test_a_process_is_kept_from_group_to_group() -> None:
    with running("process_id") as rewards:
        first = await process_id(rewards)
        assert first != os.getpid()
        assert await process_id(rewards) == first
    assert not is_alive(first)


@pytest.mark.parametrize(
    ("ending", "reason", "message"),
    [
        ("raise", "REWARD_RAISED", "row 4, completion 0: RuntimeError: judge is down"),
        ("exit", "REWARD_RAISED", "row 4: SystemExit: judge is down"),
        ("os._exit", "REWARD_CRASHED", "row 4: the reward's process died"),
        ("SIGKILL", "REWARD_CRASHED", "row 4: the reward's process died"),
        ("loop", "REWARD_TIMEOUT", "row 4: no reward within 0.3 s"),
        ("loop in C", "REWARD_TIMEOUT", "row 4: no reward within 0.3 s"),
        ("deaf loop", "REWARD_TIMEOUT", "row 4: no reward within 0.3 s"),
    ],
)
async def test_a_failure_costs_its_group_only(ending: str, reason: str, message: str) -> None:
    with running("fails", timeout_s=0.3) as rewards:
        with pytest.raises(RewardError) as caught:
            await score(rewards, ending)
        assert caught.value.reason == reason
        assert message in str(caught.value)
        assert (await score(rewards, "4")).tolist() == [1.0, 1.0, 1.0]
        assert len(reward_processes()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_the_learners_group_costs_no_reward(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """The learner ends its step first. One that starts, one that waits, and one at work."""
    with running("takes_a_while") as rewards:
        [starts] = reward_processes()
        os.kill(starts, number)
        scoring = asyncio.create_task(score(rewards))
        await until(lambda: f"begun in {starts}" in capfd.readouterr().out, pause_s=0.01)
        os.kill(starts, number)
        assert (await scoring).tolist() == [1.0, 2.0, 3.0]
        os.kill(starts, number)
        assert (await score(rewards)).tolist() == [1.0, 2.0, 3.0]
        assert reward_processes() == {starts}
    assert not is_alive(starts)


async def test_a_function_that_raises_is_logged_once_for_each_place() -> None:
    place = "at reward_functions.py:"
    with running("fails") as rewards, capture_logs() as logged:
        for _ in range(2):
            with pytest.raises(RewardError, match=rf"RuntimeError: judge is down \(.*:fails\) {place}\d+$"):
                await score(rewards, "raise")
    [entry] = [entry for entry in logged if entry["event"] == "reward raised"]
    assert 'raise RuntimeError("judge is down")' in entry["exception"]


async def test_what_a_reward_starts_can_be_ended_by_it() -> None:
    with running("ends_others", timeout_s=5) as rewards:
        assert (await score(rewards)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("ending", "reason"), [("hang", "REWARD_TIMEOUT"), ("exit", "REWARD_CRASHED"), ("", None)])
async def test_what_a_reward_has_started_ends_with_its_process(
    ending: str, reason: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with running("starts_a_program", timeout_s=1) as rewards:
        if reason is None:
            await score(rewards, ending)
            rewards.close()
        else:
            with pytest.raises(RewardError) as caught:
                await score(rewards, ending)
            assert caught.value.reason == reason
        [program] = [int(line.split()[1]) for line in capfd.readouterr().out.splitlines() if "program" in line]
        async with asyncio.timeout(10):
            await until(lambda: not is_alive(program), pause_s=0.01)


async def test_mathematics_that_never_ends_is_a_timeout() -> None:
    texts = ["$7$", "$9^{9^{9^{9}}}$"]
    rewards = RewardRunner(
        ["math_equal"], decode=lambda ids: texts[ids == COMPLETIONS[1].token_ids.tolist()], timeout_s=1
    )
    sample = dataclasses.replace(make_sample(4), ground_truth="7")
    try:
        with pytest.raises(RewardError, match="row 4: no reward within 1 s"):
            await rewards.score(sample, COMPLETIONS[:2])
        assert (await rewards.score(sample, COMPLETIONS[:1])).rewards.tolist() == [1.0]
    finally:
        rewards.close()


async def test_a_process_that_is_killed_between_groups_costs_none() -> None:
    with running("process_id") as rewards:
        first = await process_id(rewards)
        os.kill(first, signal.SIGKILL)
        [process] = rewards._processes
        await until(lambda: process._pool is None or not process._pool.active, pause_s=0.01)
        second = await process_id(rewards)
        assert second != first
        assert is_alive(second)


async def test_who_stops_waiting_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    with running("fails") as rewards:
        waiting = asyncio.create_task(score(rewards, "loop"))
        await until(lambda: "looping" in capfd.readouterr().out, pause_s=0.01)
        hanging = reward_processes()
        assert len(hanging) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not hanging & reward_processes()
        assert (await score(rewards, "4")).tolist() == [1.0, 1.0, 1.0]


async def test_a_row_that_cannot_be_sent_is_named() -> None:
    with running("length") as rewards:
        with pytest.raises(RewardError, match="row 4: its columns cannot be sent to a reward process") as caught:
            await score(rewards, ground_truth=threading.Lock())
        assert caught.value.reason == "REWARD_RAISED"
        assert (await score(rewards)).tolist() == [1.0, 2.0, 3.0]


def reward_processes() -> set[int]:
    """Those of this process."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "from multiprocessing.spawn" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Launched]:
    with launching(tmp_path) as launch:
        yield launch(module="tests.helpers.reward_learner")


def test_nothing_outlives_a_learner_that_is_killed(learner: Launched) -> None:
    learner.until(lambda: learner.stdout.count("hanging") == 2, 60, "both rewards hang")
    hanging = [int(line.split()[-1]) for line in learner.stdout.splitlines() if line.startswith("hanging")]
    assert all(is_alive(pid) for pid in hanging)
    learner.process.kill()
    learner.process.wait()
    deadline = time.monotonic() + 10
    while left := learner.left():
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["started", "hanging"])
def test_ctrl_c_ends_everything_without_a_word(learner: Launched, moment: str) -> None:
    learner.until(lambda: moment in learner.stdout, 60, moment)
    os.killpg(learner.process.pid, signal.SIGINT)
    assert learner.exit_code(30) == 130
    assert learner.stderr == ""
    deadline = time.monotonic() + 10
    while left := learner.left():  # multiprocessing's own helper sees the end of the learner, then ends
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
