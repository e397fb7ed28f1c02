"""Rank 0's loop thread, from outside."""

import socket
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

from common.config import ConfigError
from learner.config import LearnerConfig
from learner.control import Control
from learner.ledger import Ledger
from tests.fakes import FakeActor, Rows, make_group


def make_control(on_actor_event: Callable[[str], None] = print, ledger: Ledger | None = None, **values: Any) -> Control:
    config = LearnerConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t"},
            "trainer": {"total_steps": 1, "batch_prompts": 1},
            "rollout": {"actors": ["127.0.0.1:1"]},
            **values,
        }
    )
    return Control(
        config,
        backend="gloo",
        train=Rows(3),  # type: ignore[arg-type]
        held_out=None,
        processor=MagicMock(),
        ledger=ledger or Ledger(0, 3),
        version=0,
        on_actor_event=on_actor_event,
    )


def test_groups_of_a_skipped_step_are_counted_as_dropped() -> None:
    ledger = Ledger(0, 3)
    groups = [make_group(ledger.next_sequence()) for _ in range(3)]
    control = make_control(ledger=ledger)
    control._publisher = MagicMock()
    control.finish_step(groups[:1], 1, MagicMock(), skipped=[], wait_s=0.0)
    assert control.stats().dropped == {}
    control.finish_step(groups[1:], 2, MagicMock(), skipped=groups[1:], wait_s=0.0)
    assert control.stats().dropped == {"STEP_SKIPPED": 2}
    assert ledger.dropped == {"STEP_SKIPPED": [1, 2]}
    reason = {"reason": "STEP_SKIPPED"}
    assert control._metrics.registry.get_sample_value("outrider_learner_dropped_groups_total", reason) == 2
    control.close()


def test_a_start_that_fails_can_be_closed() -> None:
    """The error stays the one line about the port, and no reward process is left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        control = make_control(metrics_listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match="metrics_listen"):
            control.start()
        control.close()
        assert control._loop.is_closed()


def test_the_fleet_fails_the_trainers_next_call() -> None:
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
    control.close()
