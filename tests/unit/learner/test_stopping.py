"""What the signals of a rank do, by raising them; and what a rank says that gives up."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from learner import last_words, stopping
from learner.__main__ import _run, parse
from learner.config import LearnerConfig
from learner.evaluate import TooManyFailed
from learner.rollouts.dispatcher import TooManyDrops
from learner.stopping import AgreedStop, StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_loop_a_signal_ends_the_run_at_once(stop: StopRequest, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.is_made  # for a loop that begins nevertheless: what was interrupted may have lost the exception
    with pytest.raises(KeyboardInterrupt), stop.heeded():
        pass


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_the_first_signal_asks_and_the_second_insists(
    stop: StopRequest, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 100.9, 101.1])  # the second one is the first, passed on
    monkeypatch.setattr(stopping, "time", mock.Mock(wraps=time, monotonic=lambda: next(times)))  # of no other thread
    seen = []

    def loop() -> None:
        for _ in range(3):
            signal.raise_signal(number)
            seen.append(stop.is_made)

    with pytest.raises(KeyboardInterrupt), stop.heeded():
        loop()
    assert seen == [True, True]


def test_a_request_that_the_loop_has_not_seen_ends_the_run_after_it(stop: StopRequest) -> None:
    seen = []

    def loop() -> None:
        signal.raise_signal(signal.SIGTERM)
        seen.append(stop.is_made)

    with pytest.raises(KeyboardInterrupt), stop.heeded():
        loop()
    assert seen == [True]


def test_what_ends_the_loop_is_told(stop: StopRequest) -> None:
    def loop() -> None:
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), stop.heeded():
        loop()


def test_a_rank_that_was_not_asked_ends_in_order_with_one_that_was(stop: StopRequest) -> None:
    """That one ends first, and torchrun sends SIGTERM to the others."""
    with pytest.raises(AgreedStop), stop.heeded():
        raise AgreedStop
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # a user who insists


@pytest.mark.parametrize(
    ("error", "line", "has_traceback"),
    [
        (TooManyDrops("64 groups in a row were dropped"), "64 groups in a row were dropped", False),
        (TooManyFailed("held-out row 3 has no score"), "held-out row 3 has no score", False),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug", True),
    ],
)
def test_a_run_that_gives_up_says_why_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    line: str,
    has_traceback: bool,
) -> None:
    def fails(_: LearnerConfig) -> int:
        raise error

    monkeypatch.setattr("learner.run.run", fails)
    config = tmp_path / "run.yaml"
    sections = "model: {path: m}\ndata: {train: x}\ntrainer: {total_steps: 1, batch_prompts: 1}\n"
    config.write_text(f"name: task\nrun_dir: {tmp_path}\n{sections}")
    assert _run(parse(["--config", str(config)])) == 1
    said = capsys.readouterr().err.splitlines()
    assert (said[-1], said[0].startswith("Traceback")) == (f"learner: {line}", has_traceback)
    assert len(said) == 1 or has_traceback
    assert last_words.read(tmp_path, os.getppid()) == (1, line)
