"""What Prometheus is told, by value."""

import urllib.request
from unittest import mock

import pytest

from common.metrics import serve_metrics
from common.types import ActorState
from learner.reporting.metrics import LearnerMetrics
from learner.rollouts.dispatcher import DispatchStats
from learner.rollouts.members import FleetEvent, Member
from learner.weights.epoch import UpdateTimes
from tests.helpers.fakes import FakeActor, make_group

STATS = DispatchStats(3, {"STALE": 4}, {"HUNG": 2, "UNREACHABLE": 1})


def members() -> tuple[Member, ...]:
    client = FakeActor("a").connect()
    states = (ActorState.SERVING, ActorState.SERVING, None)
    return tuple(Member("a", client, 1, state=state) for state in states)


def make_metrics() -> LearnerMetrics:
    return LearnerMetrics(members=members, stats=lambda: STATS, num_buffered=lambda: 5)


def test_values() -> None:
    metrics = make_metrics()
    metrics.trained([make_group(0, version=4), make_group(1, version=6)], 7)
    metrics.updated(UpdateTimes(stage_s=2.0, pause_s=0.25))
    metrics.update_failed()
    metrics.fleet_event(FleetEvent("left", "a", "a#1", None, "reset"))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"outrider_learner_{name}", labels)

    assert value("policy_version") == 7
    assert (value("group_staleness_sum"), value("group_staleness_count")) == (2, 2)
    assert (value("update_stage_seconds_sum"), value("update_pause_seconds_sum")) == (2.0, 0.25)
    assert value("update_failures_total") == 1
    assert value("fleet_events_total", kind="left") == 1
    assert (value("actors", state="serving"), value("actors", state="unreachable")) == (2, 1)
    assert (value("running_groups"), value("buffered_groups")) == (3, 5)
    assert value("dropped_groups_total", reason="STALE") == 4
    assert value("retries_total", reason="HUNG") == 2


def test_the_share_of_time_that_the_trainer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own; a wait under way counts, and groups that come before the trainer asks are none."""
    now = 100.0
    monkeypatch.setattr("learner.reporting.metrics.time", mock.Mock(monotonic=lambda: now))
    metrics = make_metrics()

    def waited_s() -> float | None:
        return metrics.registry.get_sample_value("outrider_learner_waiting_seconds_total")

    assert waited_s() == 0
    metrics.waiting.begin(3)
    now = 700.0
    assert waited_s() == 600
    metrics.waiting.end(3)
    metrics.waiting.end(4)
    metrics.waiting.begin(4)
    now = 900.0
    assert waited_s() == 600
    metrics.waiting.begin(5)
    now = 901.5
    metrics.waiting.end(5)
    now = 1000.0
    assert waited_s() == 601.5


def test_over_http() -> None:
    port, stop = serve_metrics(make_metrics().registry, "127.0.0.1:0")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        stop()
    assert 'outrider_learner_actors{state="serving"} 2.0' in text
