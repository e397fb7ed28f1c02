"""OpenTelemetry spans across learner and actors. Off, and free, until `start`; the packages are an extra (`otel`).

    learner.group                                   one for each group that is trained on
      learner.prepare, learner.rollout, learner.rewards
        rollout.v1.RolloutService/Generate          the client's call, one for each try
          rollout.v1.RolloutService/Generate        the same call on the actor, in another process
            actor.decode_media, actor.queue, actor.generate
    learner.weight_update                           one for each version
      weights.v1.WeightService/Stage, .../Commit    as above, one for each actor

A trace crosses processes as W3C `traceparent` in the metadata of a call. Calls outside a trace make no spans, so that
polls of the state are none; a stream of a caller that traces nothing begins a trace on the actor. The standard
variables OTEL_* say where spans go.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import grpc

from common.config import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

_tracer: "Tracer | None" = None

Metadata = Iterable[tuple[str, str | bytes]]


def start(service: str, exporter: "SpanExporter | None" = None) -> Callable[[], None]:
    """Begin to trace; returns what sends the last spans and ends it. `service` is the name unless OTEL_SERVICE_NAME is.

    The exporter is OTLP, over gRPC or HTTP as OTEL_EXPORTER_OTLP_PROTOCOL says, by default HTTP. Raises ConfigError
    where the packages are missing.
    """
    global _tracer  # noqa: PLW0603 - one for the process, as the state of a logging library
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = exporter or _exporter()
    except ImportError as error:
        raise ConfigError(f"tracing: {error.name} is not installed; pip install -e '.[otel]'") from None
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("outrider")

    def stop() -> None:
        global _tracer  # noqa: PLW0603
        _tracer = None
        provider.shutdown()

    return stop


def _exporter() -> "SpanExporter":
    if os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


def span(name: str, **attributes: str | int | float) -> AbstractContextManager[Any]:
    """A part of what the current task does. An exception that leaves the block marks it as failed."""
    if _tracer is None:
        return nullcontext()
    return _tracer.start_as_current_span(name, attributes=_named(attributes))


def past_span(name: str, start_ns: int, end_ns: int, **attributes: str | int | float) -> None:
    """A part that is over, between two times since the epoch."""
    if _tracer is not None:
        _tracer.start_span(name, start_time=start_ns, attributes=_named(attributes)).end(end_ns)


@contextlib.contextmanager
def call_received(method: str, metadata: Metadata, *, is_stream: bool) -> Iterator[None]:
    """Around the handler of a call, as the child of the caller's span. `method` is "/package.Service/Method".

    What the handler does next in this task are its children: the context is that of one call and ends with its task.
    """
    if _tracer is None:
        yield
        return
    from opentelemetry import context, propagate, trace

    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    parent = propagate.extract(carrier, context.Context())
    if not is_stream and not trace.get_current_span(parent).get_span_context().is_valid:
        yield
        return
    received = _tracer.start_span(
        method.removeprefix("/"), parent, trace.SpanKind.SERVER, attributes={"rpc.system": "grpc"}
    )
    # Not detached: a generator that is closed from outside would do that in another context than this.
    context.attach(trace.set_span_in_context(received, parent))
    try:
        yield
    except BaseException as error:
        received.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
        raise
    finally:
        received.end()


def call_sent(method: str) -> tuple[Metadata, Callable[[grpc.aio.Call], None]] | None:
    """The metadata that a call inside a trace takes along, and what to do when it is done; None outside of one."""
    if _tracer is None:
        return None
    from opentelemetry import propagate, trace

    if not trace.get_current_span().get_span_context().is_valid:
        return None
    sent = _tracer.start_span(method.removeprefix("/"), kind=trace.SpanKind.CLIENT, attributes={"rpc.system": "grpc"})
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(sent))

    def done(call: grpc.aio.Call) -> None:
        code = _code(call)
        sent.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            sent.set_status(trace.Status(trace.StatusCode.ERROR, code.name))
        sent.end()

    return tuple(carrier.items()), done


def _code(call: Any) -> grpc.StatusCode:
    """Of a call that is done: its coroutine has nothing to wait for."""
    coroutine = call.code()
    try:
        coroutine.send(None)
    except StopIteration as stop:
        code: grpc.StatusCode = stop.value
        return code
    coroutine.close()
    return grpc.StatusCode.UNKNOWN


def _named(attributes: dict[str, str | int | float]) -> dict[str, str | int | float]:
    return {f"outrider.{name}": value for name, value in attributes.items()}
