"""What the learner tells Prometheus, on an HTTP port of rank 0 (`metrics_listen`).

| metric | type | what |
|---|---|---|
| `outrider_learner_waiting_seconds_total` | counter | of the trainer without groups; a wait under way counts |
| `outrider_learner_step_seconds` | gauge | `step_s` of the last step in `metrics.jsonl` |
| `outrider_learner_step_tokens` | gauge | its `num_tokens` |
| `outrider_learner_completions_per_second` | gauge | its `completions_per_s` |
| `outrider_learner_group_staleness` | histogram | versions that a trained group was behind |
| `outrider_learner_policy_version` | gauge | batches trained |
| `outrider_learner_actors` | gauge by `state` | actors in each state, `unreachable` too |
| `outrider_learner_running_groups` | gauge | being sampled |
| `outrider_learner_buffered_groups` | gauge | finished, waiting for the trainer |
| `outrider_learner_dropped_groups_total` | counter by `reason` | groups dropped, or sampled again for staleness |
| `outrider_learner_retries_total` | counter by `reason` | groups sent to an actor again |
| `outrider_learner_fleet_events_total` | counter by `kind` | see `learner.rollouts.members.FleetEvent` |
| `outrider_learner_update_stage_seconds` | histogram | until all actors had staged a weight update |
| `outrider_learner_update_pause_seconds` | histogram | longest pause of generation of a weight update |
| `outrider_learner_update_failures_total` | counter | weight updates that failed |

Beside these, gauges of the last values in `metrics.jsonl` under their names there, as `outrider_learner_reward`: the
other keys of `_MEASURED`, and `reward_parts` by `name`. A value that was not measured is not exported.
"""

import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.rollouts.dispatcher import DispatchStats
from learner.rollouts.members import FleetEvent, Member
from learner.types import Group
from learner.weights.epoch import UpdateTimes

_PREFIX = "outrider_learner_"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_VERSIONS = (0, 1, 2, 3, 4, 6, 8, 16, 32)
_MEASURED = {
    "reward": "Mean reward of the completions of the last step.",
    "reward_std": "Standard deviation of the rewards within a group, mean of the groups of the last step.",
    "uniform_fraction": "Share of the last step's groups whose rewards are all equal.",
    "truncated_fraction": "Share of the last step's completions that were cut off for their length.",
    "accuracy": "Mean reward of the held-out rows in the last evaluation.",
    "loss": "Loss of the last step.",
    "grad_norm": "Norm of the gradient of the last step, before clipping.",
    "clip_fraction": "Share of the last step's tokens that the clip took out of the gradient.",
    "mismatch_kl": "Estimate of KL(actor || learner) over the last step's tokens.",
    "entropy": "Mean entropy of the last step's tokens, in nats.",
    "parity_max_abs_diff": "Largest logprob difference of actor and learner where the current policy sampled.",
    "step_s": "Seconds from the end of the step before the last one to its own.",
    "completions_per_s": "Completions of the last step, divided by its seconds.",
    "num_tokens": "Tokens of the completions of the last step.",
}
# The others have the names of their keys.
_NAMES = {
    "step_s": "step_seconds",
    "completions_per_s": "completions_per_second",
    "num_tokens": "step_tokens",
}

_PARTS = "reward_parts"


class LearnerMetrics:
    """Counts where things happen; what can be asked is read when Prometheus asks, on the thread that answers."""

    def __init__(
        self,
        *,
        members: Callable[[], Sequence[Member]],
        stats: Callable[[], DispatchStats],
        num_buffered: Callable[[], int],
        version: int = 0,
    ) -> None:
        """`version`: with which this process begins."""
        self.registry = CollectorRegistry()
        self._staleness = self._histogram("group_staleness", "Versions that a trained group was behind.", _VERSIONS)
        self._stage_s = self._histogram("update_stage_seconds", "Until all actors had staged an update.", _SECONDS)
        self._pause_s = self._histogram("update_pause_seconds", "Longest pause of generation of an update.", _SECONDS)
        self._version = Gauge(f"{_PREFIX}policy_version", "Batches trained.", registry=self.registry)
        self._version.set(version)
        self._failures = Counter(f"{_PREFIX}update_failures", "Weight updates that failed.", registry=self.registry)
        self._events = Counter(f"{_PREFIX}fleet_events", "Transitions of actors.", ["kind"], registry=self.registry)
        self._measured: dict[str, Any] = {}
        self.waiting = Waiting()
        self.registry.register(_Asked(members, stats, num_buffered, self._measured, self.waiting))

    def trained(self, groups: Sequence[Group], version: int) -> None:
        """The step that led to `version` is done."""
        self._version.set(version)
        for group in groups:
            self._staleness.observe(version - 1 - group.oldest_version)

    def measured(self, values: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`, of a step or of an evaluation. None: not measured this time."""
        self._measured |= {key: values[key] for key in (*_MEASURED, _PARTS) if key in values}

    def fleet_event(self, event: FleetEvent) -> None:
        """A transition of an actor."""
        self._events.labels(event.kind).inc()

    def updated(self, times: UpdateTimes) -> None:
        """A weight update is through."""
        self._stage_s.observe(times.stage_s)
        self._pause_s.observe(times.pause_s)

    def update_failed(self) -> None:
        """A weight update failed."""
        self._failures.inc()

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", text, buckets=buckets, registry=self.registry)


class Waiting:
    """Seconds that the trainer has waited for groups. Thread-safe; what it says never falls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past_s = 0.0
        self._since: float | None = None
        self._version = -1  # the last one whose groups have come

    def begin(self, version: int) -> None:
        """The trainer has nothing to do until the groups of this version come, if they have not."""
        with self._lock:
            if version > self._version:
                self._since = time.monotonic()

    def end(self, version: int) -> None:
        """The groups of this version have come, whether the trainer waits for them or not yet."""
        with self._lock:
            self._past_s, self._since, self._version = self._total_s(), None, version

    def total_s(self) -> float:
        """Until now."""
        with self._lock:
            return self._total_s()

    def _total_s(self) -> float:
        return self._past_s + (time.monotonic() - self._since if self._since is not None else 0.0)


class _Asked(Collector):
    """What others count already."""

    def __init__(
        self,
        members: Callable[[], Sequence[Member]],
        stats: Callable[[], DispatchStats],
        num_buffered: Callable[[], int],
        measured: Mapping[str, Any],
        waiting: Waiting,
    ) -> None:
        self._waiting = waiting
        self._members = members
        self._stats = stats
        self._num_buffered = num_buffered
        self._measured = measured

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        states = Counts(member.state.value if member.state is not None else "unreachable" for member in self._members())
        actors = GaugeMetricFamily(f"{_PREFIX}actors", "Actors in each state.", labels=["state"])
        for state, number in states.items():
            actors.add_metric([state], number)
        yield actors
        for key, text in _MEASURED.items():
            yield GaugeMetricFamily(f"{_PREFIX}{_NAMES.get(key, key)}", text, self._measured.get(key))
        parts = GaugeMetricFamily(f"{_PREFIX}{_PARTS}", "Mean of a reward function in the last step.", labels=["name"])
        for name, value in self._measured.get(_PARTS, {}).items():
            if value is not None:
                parts.add_metric([name], value)
        yield parts
        waited_s = self._waiting.total_s()
        yield CounterMetricFamily(f"{_PREFIX}waiting_seconds", "Of the trainer without groups, until now.", waited_s)
        stats = self._stats()
        yield GaugeMetricFamily(f"{_PREFIX}running_groups", "Groups being sampled.", stats.running)
        yield GaugeMetricFamily(f"{_PREFIX}buffered_groups", "Groups that wait for the trainer.", self._num_buffered())
        for name, text, counts in (
            ("dropped_groups", "Groups dropped.", stats.dropped),
            ("retries", "Groups sent again.", stats.retries),
        ):
            family = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=["reason"])
            for reason, number in counts.items():
                family.add_metric([reason], number)
            yield family
