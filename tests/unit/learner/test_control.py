"""Rank 0's loop thread, from outside."""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import MagicMock

import pytest

from common.config import ConfigError, NotYet
from common.types import ServerLimits
from learner.config import LearnerConfig
from learner.control import Control, describe, own_address, still_waiting
from learner.data.ledger import Ledger
from learner.evaluate import TooManyFailed
from learner.rollouts.members import FleetEvent
from learner.rollouts.slots import Slots
from learner.types import ProcessedPrompt, PromptSample
from tests.helpers.fakes import FakeActor, Rows, make_group


class Make(Protocol):
    def __call__(
        self, notify: Callable[[str], None] = print, ledger: Ledger | None = None, **values: Any
    ) -> Control: ...


@pytest.fixture
def make_control() -> Iterator[Make]:
    """A control, closed at the end."""
    made = contextlib.ExitStack()

    def make(notify: Callable[[str], None] = print, ledger: Ledger | None = None, **values: Any) -> Control:
        config = LearnerConfig.model_validate(
            {
                "model": {"path": "m"},
                "data": {"train": "t"},
                "trainer": {"total_steps": 1, "batch_prompts": 1},
                "rollout": {"actors": ["127.0.0.1:1"]},
                **values,
            }
        )
        control = Control(
            config,
            backend="gloo",
            train=Rows(3),  # type: ignore[arg-type]
            held_out=None,
            processor=MagicMock(),
            ledger=ledger or Ledger(0, 3),
            version=0,
            notify=notify,
        )
        return made.enter_context(contextlib.closing(control))

    with made:
        yield make


def test_actors_that_end_with_the_run_are_no_news(make_control: Make) -> None:
    lines: list[str] = []
    control = make_control(notify=lines.append)
    event = FleetEvent("left", "127.0.0.1:1", "one#1", None, "it was killed")
    control._tell_event(event)
    control._is_stopping = lambda: True
    control._tell_event(event)
    assert lines == [describe(event)]


def test_groups_of_a_skipped_step_are_counted_as_dropped(make_control: Make) -> None:
    ledger = Ledger(0, 3)
    lines: list[str] = []
    groups = [make_group(ledger.next_sequence()) for _ in range(3)]
    control = make_control(lines.append, ledger=ledger)
    control._publisher = MagicMock()
    control.finish_step(groups[:1], 1, skipped=[])
    assert control.stats().dropped == {}
    control.finish_step(groups[1:], 2, skipped=groups[1:])
    assert control.stats().dropped == {"STEP_SKIPPED": 2}
    assert ledger.dropped == {"STEP_SKIPPED": [1, 2]}
    [line] = lines
    assert line.startswith("group dropped, STEP_SKIPPED: loss or gradient of step 2 was not finite; ")
    reason = {"reason": "STEP_SKIPPED"}
    assert control._metrics.registry.get_sample_value("outrider_learner_dropped_groups_total", reason) == 2


def test_a_stop_waits_for_no_evaluation(make_control: Make) -> None:
    control = make_control()
    control._fleet._connect = lambda _: FakeActor("127.0.0.1:1").connect()
    control.start()
    cancelled = threading.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.set()

    async def failing() -> None:
        raise TooManyFailed("its actors were ended first")

    assert control._call(long(), lambda: True) is None
    assert cancelled.wait(10)
    assert control._call(failing(), lambda: True) is None
    with pytest.raises(TooManyFailed):
        control._call(failing(), lambda: False)


def test_a_start_that_fails_can_be_closed(make_control: Make) -> None:
    """The error stays the one line about the port, and no reward process is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        control = make_control(metrics_listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match="metrics_listen"):
            control.start()
        control.close()
        assert control._loop.is_closed()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rollout": {"max_tokens": 500}}, "rollout.max_tokens is 500, but vllm.max_model_len of {} is 128; lower the"),
        ({"rollout": {"n": 9, "max_tokens": 128}}, "rollout.n is 9, but limits.max_group_size of {} is 8; lower the"),
        (
            {"rollout": {"max_tokens": 128}, "evaluation": {"samples": 16}, "data": {"held_out": "h"}},
            "evaluation.samples is 16, but limits.max_group_size of {} is 8; lower the",
        ),
    ],
)
def test_what_no_actor_can_take_ends_the_start(
    make_control: Make, values: dict[str, dict[str, Any]], line: str
) -> None:
    base: dict[str, dict[str, Any]] = {"rollout": {"actors": ["127.0.0.1:1"]}, "data": {"train": "t"}}
    control = make_control(**{key: base.get(key, {}) | values.get(key, {}) for key in {**base, **values}})
    actor = FakeActor("127.0.0.1:1", limits=ServerLimits(max_context_tokens=128, max_group_size=8))
    control._fleet._connect = lambda _: actor.connect()
    with pytest.raises(ConfigError, match=re.escape(line.format("actor 127.0.0.1:1"))) as caught:
        control.start()
    assert caught.value.exit_code == 2


def test_what_an_actor_just_takes_begins(make_control: Make) -> None:
    control = make_control(rollout={"actors": ["127.0.0.1:1"], "max_tokens": 128, "n": 8})
    actor = FakeActor("127.0.0.1:1", limits=ServerLimits(max_context_tokens=128, max_group_size=8))
    control._fleet._connect = lambda _: actor.connect()
    control.start()


@pytest.mark.parametrize(
    ("actors", "expected"),
    [
        (["127.0.0.1:1", "localhost:2"], "127.0.0.1"),
        (["[::1]:1", "127.0.0.1:1"], "::1"),
        (["127.0.0.1:1", "unknown:1", "10.0.0.7:1", "10.1.0.7:1"], "10.0.0.2"),  # the one on loopback reaches it too
        (["10.1.0.7:1", "10.0.0.7:1"], "10.1.0.2"),
    ],
)
def test_the_address_that_every_actor_reaches(
    actors: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1"}
    routes |= {"10.0.0.7": "10.0.0.2", "10.1.0.7": "10.1.0.2"}

    def towards(host: str, _port: int) -> str:
        if host not in routes:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return routes[host]

    monkeypatch.setattr("learner.control.address_towards", towards)
    assert own_address(actors) == expected
    with pytest.raises(ConfigError, match=r"no address .* unknown:1; give weights\.host"):
        own_address(["unknown:1"])


def test_a_weights_host_of_another_machine_is_named(make_control: Make) -> None:
    control = make_control(weights={"host": "203.0.113.1"})
    control._fleet._connect = lambda _: FakeActor("127.0.0.1:1").connect()
    with pytest.raises(ConfigError, match=r"weights\.host: 203\.0\.113\.1 is no address of this machine: "):
        control.start()


def test_the_fleet_fails_the_trainers_next_call(make_control: Make) -> None:
    """Its tasks are nobody's child: an actor that is polled no more would only never be heard of again."""

    def full_disk(line: str) -> None:
        if "left" in line:
            raise OSError("no space left on device")

    actor = FakeActor("127.0.0.1:1")
    control = make_control(full_disk)
    control._fleet._connect = lambda _: actor.connect()
    control.start()
    actor.kill()
    with pytest.raises(OSError, match="no space left"):
        control.take_batch(0, lambda _: True)


def test_an_evaluation_ends_with_what_ended_the_loop(make_control: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row waits for weights that do not come, and is cancelled when the loop ends."""

    def broken_row(_: PromptSample) -> ProcessedPrompt:
        evaluation_began.wait(timeout=10)
        raise ConfigError("row 7: images[0] is too large")

    evaluation_began = threading.Event()
    group = make_group(0)
    hold = Slots.hold

    def held(*arguments: Any) -> Any:
        evaluation_began.set()
        return hold(*arguments)

    monkeypatch.setattr("learner.evaluate._prepare", lambda *_: (group.sample, group.processed))
    monkeypatch.setattr(Slots, "hold", held)
    control = make_control()
    control._fleet._connect = lambda _: FakeActor("127.0.0.1:1").connect()
    control._held_out = Rows(1)  # type: ignore[assignment]
    monkeypatch.setattr(control._dispatcher._processor, "process", broken_row)
    control.start()
    with pytest.raises(ConfigError, match=r"row 7: images\[0\] is too large"):
        control.evaluate(5, lambda: False)


def test_an_actor_that_still_loads_is_waited_for() -> None:
    event = FleetEvent("unreachable", "127.0.0.1:57051", "", None, "Connection refused")
    assert describe(event) == "waiting for actor 127.0.0.1:57051 (Connection refused) ..."


def test_who_is_waited_for_is_said_again_and_again(
    make_control: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the log of one that the launcher has started; nobody listens at these ports."""
    monkeypatch.setattr("learner.control._WAITING_S", 0.05)
    (tmp_path / "actors.json").write_text('{"127.0.0.1:1": 10, "127.0.0.1:2": 11}')
    lines: list[str] = []
    actors = [f"127.0.0.1:{port}" for port in (1, 2, 3)]
    rollout = {"actors": actors, "startup_timeout_s": 1.0}
    control = make_control(lines.append, rollout=rollout, run_dir=tmp_path)
    with pytest.raises(NotYet, match="no answer within 1 s"):
        control.start()
    again = [line for line in lines if "waiting for 3 actors" in line]
    assert len(again) > 2
    log = tmp_path / "logs" / "actor-0.log"
    assert set(again) <= {f"waiting for 3 actors, {seconds} s: still loading ({log})" for seconds in (0, 1)}


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ({}, "waiting for actors, 40 s: no address is known yet"),
        ({"10.0.0.1:1": "Connection refused"}, "waiting for 1 actor, 40 s: 10.0.0.1:1 (Connection refused)"),
        ({"10.0.0.1:1": "x", "h:2": "y"}, "waiting for 2 actors, 40 s: 10.0.0.1:1 (x)"),
        ({"10.0.0.1:1": "x", "127.0.0.1:2": "y"}, "waiting for 2 actors, 40 s: still loading (r/logs/actor-1.log)"),
    ],
)
def test_the_first_that_is_waited_for_has_its_log_named(missing: dict[str, str], line: str) -> None:
    assert still_waiting(missing, 40.4, {"127.0.0.1:2": Path("r/logs/actor-1.log")}) == line


@pytest.mark.timeout(20)
def test_a_disk_that_is_full_under_the_log_ends_the_run(make_control: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    async def start(**_: Any) -> None:
        raise ConfigError("no actor answers")

    control = make_control()
    monkeypatch.setattr(control._fleet, "start", start)
    monkeypatch.setattr("learner.control.log.error", full_disk)
    with pytest.raises(ConfigError, match="no actor answers"):
        control.start()
    with pytest.raises(ConfigError, match="no actor answers"):
        control.take_batch(0, lambda _: True)
