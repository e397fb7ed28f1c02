"""The single-machine launcher with the fake engine: mistakes of the user, kills at the wrong time, two at once."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from examples.digits.model import build_model
from tests.helpers.launched import Launched, actor_pids, free_ports, is_alive, launching, run_dirs

CONFIG = "examples/digits/config.yaml"
# The learner's imports alone take seconds, on a busy machine many.
START_S = 120

Launch = Callable[..., Launched]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture
def launch(tmp_path: Path, model_dir: Path) -> Iterator[Launch]:
    """The demo's configuration with two fake actors; an argument replaces what an earlier one says."""
    with launching(tmp_path / "output") as start:

        def fake(*overrides: str, config: str = CONFIG) -> Launched:
            return start(
                *("--config", config, f"runs_dir={tmp_path / 'runs'}", f"model.path={model_dir}"),
                *("local.actor={engine: fake}", f"local.base_port={free_ports(2)}", "rollout.startup_timeout_s=300"),
                *("trainer.max_parity_diff=null", "trainer.max_mean_parity_diff=null"),
                *overrides,
            )

        yield fake


# The actors never become ready, so the learner waits for them as long as the test wants.
SLOW = "local.actor={engine: fake, fake: {start_s: 600}}"


def waiting_run(launched: Launched, runs_dir: Path, index: int = 0) -> Path:
    """The folder of a run whose learner waits for its actors."""

    def found() -> Path | None:
        if len(run_dirs(runs_dir)) <= index:
            return None
        run_dir = run_dirs(runs_dir)[index]
        waits = "parameters train" in launched.stdout
        return run_dir if waits and len(actor_pids(run_dir)) == 2 else None

    return launched.until(found, START_S, "the learner waits for its actors")


def test_mistakes_are_one_line_and_exit_code_2(launch: Launch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        mistakes = {
            ("optimizer.schedul=linear",): f"{CONFIG}: optimizer.schedul: unknown key; did you mean schedule?",
            ("trainer.total_steps=many",): f"{CONFIG}: trainer.total_steps: Input should be a valid integer",
            (
                "model.path=no/such/place",
            ): "model.path: no/such/place holds no checkpoint (config.json); give a directory",
            (
                f"local.base_port={port}",
            ): f"127.0.0.1:{port} is in use by another process; stop it, or set local.base_port",
            ("local.num_actors=0",): "rollout.actors is empty; give the actors' addresses",
        }
        running = {launch(*overrides): line for overrides, line in mistakes.items()}
        for launched, line in running.items():
            assert launched.exit_code(START_S) == 2, launched.said()
            check_one_line(launched, line)
        assert len(run_dirs(tmp_path / "runs")) == 1  # who has the port is known from the folder only


def test_mistakes_in_rows_and_rewards_are_one_line_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "hello", "answer": "1"}\n')
    mistakes = {
        (
            f"data.train={tmp_path / 'train.jsonl'}",
            *("data.held_out=''", "trainer.eval_every=0"),
        ): "no image column 'images' (it has prompt, answer)",
        ("reward.functions=[examples.digits.reward:exact]",): "reward: module 'examples.digits.reward' has no 'exact'",
    }
    for overrides, line in mistakes.items():
        launched = launch(SLOW, *overrides)
        assert launched.exit_code(START_S) == 2, launched.said()
        check_one_line(launched, line)
        assert launched.stdout == ""
    assert not (tmp_path / "runs").exists()  # nor is there a log of an actor


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("reward.functions=[examples.digits.reward:exact]", "module 'examples.digits.reward' has no 'exact'"),
        ("data.train=examples.digits.data:trian", "module 'examples.digits.data' has no 'trian'"),
    ],
)
def test_a_learner_without_launcher_finds_them_before_it_loads(tmp_path: Path, override: str, line: str) -> None:
    """The checkpoint is none that could be loaded, and nobody is at the address of the actor."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({}, tmp_path / "model" / "weights.safetensors")
    arguments = ("--config", CONFIG, f"runs_dir={tmp_path / 'runs'}", f"model.path={tmp_path / 'model'}")
    launched = Launched(tmp_path, (*arguments, "rollout.actors=['127.0.0.1:1']", override), module="learner")
    assert launched.exit_code(START_S) == 2, launched.said()
    [said] = launched.stderr.splitlines()
    assert said.endswith(line)
    assert not (tmp_path / "runs").exists()


def test_rows_that_may_come_yet_are_no_mistake(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_from_afar.py").write_text("def rows():\n    raise ConnectionError('nobody there')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    launched = launch(SLOW, "data.train=rows_from_afar:rows")
    assert launched.exit_code(START_S) == 1, launched.said()
    check_one_line(launched, "nobody there")
    assert not (tmp_path / "runs").exists()


def test_a_mistake_that_only_the_learner_can_find_is_one_line(launch: Launch) -> None:
    launched = launch(SLOW, "model.cpu_offload=true", "trainer.device=cpu")
    assert launched.exit_code(START_S) == 2, launched.said()
    check_one_line(launched, "model.cpu_offload moves what trains from a GPU to the CPU")


def test_actors_that_are_not_there_yet_are_one_line_and_no_mistake(launch: Launch) -> None:
    nobody = f"rollout.actors=['127.0.0.1:{free_ports(1)}']"
    launched = launch("local.num_actors=0", nobody, "rollout.startup_timeout_s=1")
    assert launched.exit_code(START_S) == 1, launched.said()
    check_one_line(launched, "no answer within 1 s from 127.0.0.1:")


def check_one_line(launched: Launched, line: str) -> None:
    [said] = launched.stderr.splitlines()
    assert said.startswith(f"outrider: {line}") or line in said.removeprefix("outrider: ")
    assert said.startswith("outrider: ")
    assert "Traceback" not in launched.stdout
    assert not launched.left()


def test_a_run_whose_images_do_not_add_up_stops(launch: Launch) -> None:
    """The fake engine's ids are not those of the model's processor: nothing may be trained on them."""
    launched = launch()
    assert launched.exit_code(START_S) == 1
    [said] = launched.stderr.splitlines()
    assert said.startswith("outrider: ImageMismatch: group ")
    assert "by the learner's own processor" in said
    assert not launched.left()


@pytest.mark.alone
def test_a_killed_launcher_leaves_no_learner_and_its_actors_are_found_again(launch: Launch, tmp_path: Path) -> None:
    port = f"local.base_port={free_ports(2)}"
    first = launch(SLOW, port)
    run_dir = waiting_run(first, tmp_path / "runs")
    pids = actor_pids(run_dir)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    wait_for(lambda: not first.left("learner") and not first.left("learner.torchrun"), 20)
    assert all(is_alive(pid) for pid in pids.values())

    second = launch(SLOW, port)
    waiting_run(second, tmp_path / "runs")
    assert run_dirs(tmp_path / "runs") == [run_dir]
    assert actor_pids(run_dir) == pids
    for address, pid in pids.items():
        assert f"actor {address} is still running (pid {pid}) and is used again" in second.stdout
    check_stops(second, first)
    assert not (run_dir / "actors.json").exists()


@pytest.mark.alone
def test_the_same_command_twice_disturbs_nothing(launch: Launch, tmp_path: Path) -> None:
    port = f"local.base_port={free_ports(2)}"
    first = launch(SLOW, port)
    run_dir = first.until(lambda: next(iter(run_dirs(tmp_path / "runs")), None), START_S, "a run folder")
    first.until(lambda: len(actor_pids(run_dir)) == 2, START_S, "actors")
    early = launch(SLOW, port, f"run_dir={run_dir}")  # its learner has not even loaded
    assert early.exit_code(START_S) == 2
    assert "is at work in this run folder" in early.stderr
    waiting_run(first, tmp_path / "runs")
    for overrides in ((), (f"run_dir={run_dir}",)):
        again = launch(SLOW, port, *overrides)
        assert again.exit_code(START_S) == 2
        assert len(again.stderr.splitlines()) == 1
        assert not again.left()
    assert all(is_alive(pid) for pid in actor_pids(run_dir).values())
    assert first.left("learner")
    assert first.process.poll() is None
    # With ports of its own it is a run of its own.
    other = launch(SLOW)
    runs = other.until(
        lambda: [run for run in run_dirs(tmp_path / "runs") if actor_pids(run)][1:], START_S, "another run"
    )
    assert not set(actor_pids(runs[0]).values()) & set(actor_pids(run_dir).values())
    check_stops(first)
    assert other.process.poll() is None
    assert all(is_alive(pid) for pid in actor_pids(runs[0]).values())
    check_stops(other)


def test_a_stopped_rank_ends_the_run_and_is_named(launch: Launch, tmp_path: Path) -> None:
    """Rank 0 waits for actors, and the other rank for rank 0; nothing but the watch would end that before hours."""
    launched = launch(SLOW, "local.num_ranks=2", "trainer.rank_timeout_s=5")
    waiting_run(launched, tmp_path / "runs")
    os.kill(launched.pid_of_rank(1), signal.SIGSTOP)
    assert launched.exit_code(60) == 1
    assert launched.stderr.splitlines() == [
        "outrider: nothing has been heard for 5 s of rank 1: stopped or cut off; "
        "the job ends, and started again it goes on from its last checkpoint"
    ]
    assert not launched.left()


def test_a_second_signal_waits_for_no_learner(launch: Launch, tmp_path: Path) -> None:
    """The first one gives it time to end its step; one that is stopped takes no signal."""
    launched = launch(SLOW)
    waiting_run(launched, tmp_path / "runs")
    os.kill(launched.pid_of_rank(0), signal.SIGSTOP)
    launched.process.send_signal(signal.SIGINT)
    launched.until(lambda: "the learner ends its step and writes a checkpoint" in launched.stderr, 60, "a word")
    launched.process.send_signal(signal.SIGINT)
    assert launched.exit_code(30) == 130
    assert not launched.left()


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_everything_loads(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    launched = launch(SLOW)
    launched.until(lambda: launched.left("learner.torchrun"), START_S, "torchrun")
    check_stops(launched, number=number)


def check_stops(launched: Launched, *also: Launched, number: signal.Signals = signal.SIGINT) -> None:
    """The signal to the launcher ends every process within 5 s, with exit code 130. For tests that run alone."""
    started_at = time.monotonic()
    launched.process.send_signal(number)
    wait_for(lambda: not any(one.left() for one in (launched, *also)), 5)
    assert time.monotonic() - started_at < 5
    assert launched.exit_code(1) == 130
    assert launched.stderr.strip().splitlines()[-1].startswith("outrider: stopped")


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
