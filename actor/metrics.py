"""What an actor tells Prometheus, on an HTTP port of its own.

| metric | type | what |
|---|---|---|
| `outrider_actor_state` | gauge by `state` | 1 for the state that it is in |
| `outrider_actor_policy_version` | gauge | version that it serves |
| `outrider_actor_running_completions`, `..._waiting_completions` | gauge | in the engine, and in its queue |
| `outrider_actor_kv_cache_usage` | gauge | share of vLLM's cache of keys and values that is in use, some seconds ago |
| `outrider_actor_preemptions_total` | counter | completions that had to leave it for others, and were computed again |
| `outrider_actor_groups_total` | counter by `outcome` | groups `finished`, `refused`, `cancelled`, `failed` |
| `outrider_actor_completions_total` | counter by `finish_reason` | finished completions |
| `outrider_actor_tokens_total` | counter | their tokens |
| `outrider_actor_first_token_seconds`, `outrider_actor_completion_seconds` | histogram | from the request's arrival |
| `outrider_actor_token_seconds` | histogram | mean time to each further token of a completion |
| `outrider_actor_media_total` | counter by `source` | media items `sent` with a request, `stored` here, `missing` |
| `outrider_actor_pause_seconds` | histogram | how long a weight update stopped generation |
| `outrider_actor_longest_stall_seconds` | gauge | the longest that the event loop did not turn in the last minute |
| `outrider_actor_longest_busy_seconds` | gauge | the longest that its thread computed: the rest is the machine's |
"""

import functools
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from actor.engine import Engine
from actor.weights.policy_state import PolicyState
from common.metrics import serve_metrics
from common.process.stalls import StallWatch
from common.types import ActorState, Completion

_PREFIX = "outrider_actor_"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)


class ActorMetrics:
    """Counts in the event loop; gauges are read when somebody asks, from the thread that answers."""

    def __init__(self, policy: PolicyState, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.groups = self._counter("groups", "Calls of Generate.", "outcome")
        self.media = self._counter("media", "Media items of requests.", "source")
        self.pauses = self._histogram("pause_seconds", "Pause of generation for a weight update.")
        self._completions = self._counter("completions", "Finished completions.", "finish_reason")
        self._tokens = self._counter("tokens", "Tokens of finished completions.")
        self._first_token_s = self._histogram("first_token_seconds", "Time to the first token of a completion.")
        self._token_s = self._histogram(
            "token_seconds", "Mean time to each further token of a completion.", _TOKEN_SECONDS
        )
        self.stalls = StallWatch()
        for name, text, longest in (
            ("longest_stall_seconds", "Longest stall of the event loop in a minute.", self.stalls.stalled),
            ("longest_busy_seconds", "Longest that the event loop computed in a minute.", self.stalls.busy),
        ):
            self._gauge(name, text, longest.value_s)
        self._finished_s = self._histogram("completion_seconds", "Time to the end of a completion.")
        self._gauge("policy_version", "Policy version that is served.", lambda: policy.policy_version)
        self._gauge("running_completions", "Completions in the engine.", lambda: engine.load().num_running)
        self._gauge("waiting_completions", "Completions in its queue.", lambda: engine.load().num_waiting)
        self._gauge("kv_cache_usage", "Share of the cache in use.", lambda: engine.load().cache_usage)
        self.registry.register(
            _Counted(
                f"{_PREFIX}preemptions",
                "Completions that had to leave the cache.",
                lambda: engine.load().num_preemptions,
            )
        )
        states = Gauge(f"{_PREFIX}state", "1 for the state that it is in.", ["state"], registry=self.registry)
        for state in ActorState:
            states.labels(state.value).set_function(functools.partial(_is_in, policy, state))

    def finished(self, completions: Sequence[Completion]) -> None:
        """Count completions that are about to be sent."""
        for completion in completions:
            self._completions.labels(completion.finish_reason.value).inc()
            self._tokens.inc(len(completion.token_ids))
            self._first_token_s.observe(completion.first_token_s)
            self._finished_s.observe(completion.finished_s)
            if (further := len(completion.token_ids) - 1) > 0:
                self._token_s.observe((completion.finished_s - completion.first_token_s) / further)

    def serve(self, listen: str) -> tuple[int, Callable[[], None]]:
        """Answer HTTP at `host:port`; the port, and what stops it. Raises ConfigError if it is taken."""
        return serve_metrics(self.registry, listen)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", text, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"{_PREFIX}{name}", text, registry=self.registry).set_function(value)


class _Counted(Collector):
    """A counter that the engine keeps."""

    def __init__(self, name: str, text: str, value: Callable[[], int]) -> None:
        self._name = name
        self._text = text
        self._value = value

    def collect(self) -> Iterator[Metric]:
        """Its value now."""
        yield CounterMetricFamily(self._name, self._text, self._value())


def _is_in(policy: PolicyState, state: ActorState) -> float:
    return float(policy.state is state)
