"""Actors of the single-machine launcher that an earlier command has left."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError
from learner.config import LocalConfig
from learner.launcher import actors
from learner.launcher.actors import LocalActors
from tests.helpers.launched import free_ports

# What the launcher starts in place of an actor: it has an actor's command line.
SLEEPER = "import time; time.sleep(600)"
REAL = subprocess.Popen


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that were started, in order."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        processes.append(REAL([sys.executable, "-c", SLEEPER, *command[2:]], **options))
        while not Path(f"/proc/{processes[-1].pid}/cmdline").read_bytes():
            time.sleep(0.01)  # the kernel fills it in a moment after Popen has returned
        return processes[-1]

    monkeypatch.setattr(actors.subprocess, "Popen", start)  # type: ignore[attr-defined]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(run_dir: Path, port: int, num_actors: int = 2, **options: Any) -> dict[str, int]:
    """What the next command has: address to process id."""
    actor = options.pop("actor", {"engine": "fake"})
    LocalActors(LocalConfig(num_actors=num_actors, base_port=port, actor=actor), run_dir, run_dir, **options).start()
    pids: dict[str, int] = json.loads((run_dir / "actors.json").read_text())
    return pids


def test_those_that_are_wanted_still_are_used_again(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    (tmp_path / "logs").mkdir()
    port = free_ports(2)
    one, two = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    first = start(tmp_path, port)
    assert start(tmp_path, port) == first == {one: started[0].pid, two: started[1].pid}

    logs = actors.logs(tmp_path)
    assert logs == {one: tmp_path / "logs" / "actor-0.log", two: tmp_path / "logs" / "actor-1.log"}
    assert all(path.exists() for path in logs.values())
    assert actors.logs(tmp_path / "of nobody") == {}

    # The second one is too many: it does not keep its memory.
    assert start(tmp_path, port, num_actors=1) == {one: started[0].pid}
    assert (len(started), started[0].poll(), started[1].wait(10)) == (2, None, -9)


@pytest.mark.parametrize("other", [{"actor": {"engine": "fake", "max_streams": 7}}, {"gpus": [("3",), ("5",)]}])
def test_those_with_other_settings_are_started_anew(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], other: dict[str, Any]
) -> None:
    (tmp_path / "logs").mkdir()
    port = free_ports(2)
    start(tmp_path, port)
    assert [*start(tmp_path, port, **other).values()] == [process.pid for process in started[2:]]
    assert [process.wait(10) for process in started[:2]] == [-9, -9]
    assert [*start(tmp_path, port, **other).values()] == [process.pid for process in started[2:]]


def test_one_of_another_base_port_is_not_the_one_of_its_place(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    (tmp_path / "logs").mkdir()
    port = free_ports(3)
    gpus = [("0",), ("1",)]
    start(tmp_path, port, gpus=gpus)
    # The address of the first one is that of the second one before, which has another GPU.
    assert [*start(tmp_path, port + 1, gpus=gpus).values()] == [process.pid for process in started[2:]]


@pytest.mark.parametrize(
    ("script", "num_starts", "says"),
    [
        ("sys.exit(1)", 3, "does not start: see .*actor-0.log$"),
        ("int('x')", 3, "does not start: ValueError: invalid literal for int.*: 'x'$"),
        ("print('actor: no memory'); sys.exit(1)", 3, "does not start: no memory$"),
        (
            "print('actor: vllm.max_model_len: too long'); sys.exit(2)",
            1,
            "does not start: vllm.max_model_len: too long$",
        ),
    ],
)
def test_one_that_is_never_ready_is_not_started_for_ever(
    tmp_path: Path,
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    num_starts: int,
    says: str,
) -> None:
    monkeypatch.setattr(f"{__name__}.SLEEPER", f"import sys; {script}")
    with pytest.raises(ConfigError, match=says):
        live(tmp_path, started, num_rounds=10)
    assert len(started) == num_starts
    again = [line for line in capsys.readouterr().out.splitlines() if "ended with 1, and is started again" in line]
    reason = says.removeprefix("does not start: ")
    assert len(again) == num_starts - 1
    assert all(re.search(reason.removesuffix("$"), line) and str(tmp_path) in line for line in again)


def test_one_that_is_killed_is_not_told_of_with_words_of_another_time(
    tmp_path: Path,
    started: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "print('Traceback (most recent call last):\\nValueError: a bad request', flush=True)"
    script = f"import os, sys; print('actor a ready on', sys.argv[-1]); {words}; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(f"{__name__}.SLEEPER", script)
    live(tmp_path, started, num_rounds=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is started again" in line]
    assert "ended with -9" in line
    assert "a bad request" not in line


def test_one_that_has_been_ready_is_started_again_and_again(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.SLEEPER", "import sys; print('actor a ready on', sys.argv[-1]); sys.exit(1)")
    live(tmp_path, started, num_rounds=5)
    assert len(started) == 6


def live(run_dir: Path, started: list[subprocess.Popen[bytes]], num_rounds: int) -> None:
    """An actor that ends so often, and the launcher that looks after each time."""
    (run_dir / "logs").mkdir()
    config = LocalConfig(num_actors=1, base_port=free_ports(1), actor={"engine": "fake"})
    actors = LocalActors(config, run_dir, run_dir)
    actors.start()
    for _ in range(num_rounds):
        started[-1].wait(10)
        actors.restart_dead()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_started_when_ctrl_c_comes_is_known(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """In a session of its own it would live on, with its port and its memory, and nobody would find it."""
    start_one = actors.subprocess.Popen  # type: ignore[attr-defined]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        process = start_one(*arguments, **options)
        signal.raise_signal(number)
        return process

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(actors.subprocess, "Popen", interrupted)  # type: ignore[attr-defined]
    (tmp_path / "logs").mkdir()
    before = signal.signal(number, raise_interrupt)
    local = LocalActors(
        LocalConfig(num_actors=2, base_port=free_ports(2), actor={"engine": "fake"}), tmp_path, tmp_path
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            local.start()
        assert signal.getsignal(number) is raise_interrupt
    finally:
        signal.signal(number, before)
    assert len(started) == 1
    local.terminate()
    local.end(time.monotonic() + 10)
    assert started[0].returncode == -signal.SIGTERM
