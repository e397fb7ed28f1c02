"""One trace from the learner's dispatcher through an actor process, as a collector on a socket receives it."""

import asyncio
import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common import tracing
from common.client import GrpcClient
from common.config import ConfigError
from common.errors import InvalidRequest
from common.media import content_hash
from common.types import MediaItem, RolloutRequest, SamplingParams, TextPrompt
from learner.data.ledger import Ledger
from learner.rollouts.buffer import GroupBuffer
from learner.rollouts.credits import Credits
from learner.rollouts.dispatcher import Dispatcher
from learner.rollouts.fleet import Fleet
from learner.rollouts.sampler import Sampler
from learner.types import ProcessedPrompt, PromptSample
from learner.weights.publisher import Publisher
from learner.weights.snapshot import Snapshotter
from tests.helpers.fake_actors import Launch, StartActor, png
from tests.helpers.fakes import InlineRewards, Rows, until

GENERATE = "rollout.v1.RolloutService/Generate"


@dataclasses.dataclass(frozen=True)
class Received:
    """One span, of one service."""

    service: str
    name: str
    trace: bytes
    span: bytes
    parent: bytes
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, Any]


class Collector:
    """What an OTLP collector does with what it gets over HTTP or gRPC: here it only keeps it."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                collector.take(trace_service_pb2.ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        self._grpc = grpc.server(futures.ThreadPoolExecutor(1))
        add_to: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_to(self, self._grpc)
        self.endpoints = {
            "http/protobuf": f"http://127.0.0.1:{self._http.server_port}",
            "grpc": f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}",
        }
        self._grpc.start()

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802
        self.take(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def take(self, request: Any) -> None:
        for resource in request.resource_spans:
            [service] = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    attributes = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                    self.spans.append(
                        Received(
                            service,
                            span.name,
                            span.trace_id,
                            span.span_id,
                            span.parent_span_id,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.code == 2,
                            attributes,
                        )
                    )

    def close(self) -> None:
        self._grpc.stop(None).wait()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoints["http/protobuf"])
    yield collector
    collector.close()


@pytest.fixture
def memory() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    stop = tracing.start("test", exporter)
    yield exporter
    stop()


class Processed:
    """Of prompts without images, as the fake engine understands them: one id for each byte."""

    def process(self, sample: PromptSample) -> ProcessedPrompt:
        text = "".join(message.role + part.text for message in sample.messages for part in message.parts)
        ids = np.array([2 + byte % 318 for byte in text.encode()], np.int32)
        return ProcessedPrompt(ids, np.arange(len(ids))[None], len(ids), {}, (), ())


async def test_a_group_and_a_weight_update_are_one_trace_each(
    launch: Launch, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatcher, sampler, fleet and publisher as in a run, an actor process; spans come over both protocols."""
    stop = tracing.start("outrider-learner")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoints["grpc"])
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-actor")
    fake = ("fake.first_token_s=0.05", "fake.token_s=0.01")
    actor = await launch("--engine", "fake", "--listen", "127.0.0.1:0", "tracing=true", *fake)
    fleet = Fleet([actor.address], run_id="run")
    await fleet.start(startup_timeout_s=10)
    publisher = Publisher(fleet, run_id="run", host="127.0.0.1", backend="gloo", timeout_s=30)
    publishing = asyncio.create_task(publisher.run())
    taken = Snapshotter(torch.nn.Linear(4, 4), [], is_sender=True, bucket_bytes=2**20).take(1)
    assert taken is not None
    publisher.submit(taken)
    await until(lambda: fleet.live() and fleet.live()[0].version == 1, pause_s=0.01)
    buffer = GroupBuffer(1)
    dispatcher = Dispatcher(
        dataset=Rows(10),
        ledger=Ledger(0, 10),
        processor=Processed(),
        sampler=Sampler(fleet),
        rewards=InlineRewards(lambda **_: 1.0),
        buffer=buffer,
        credits=Credits(1, 0, step=1),
        sampling=SamplingParams(n=2, max_tokens=4),
        run_id="r",
    )
    running = asyncio.create_task(dispatcher.run())
    [group] = await asyncio.to_thread(buffer.take, 1, version=1, max_staleness=0, timeout_s=20)
    for task in (running, publishing):
        task.cancel()
    await asyncio.gather(running, publishing, return_exceptions=True)
    await fleet.close()
    await asyncio.to_thread(stop)
    actor.process.terminate()
    assert await actor.exit_code() == 0

    by_name = collections.defaultdict(list)
    for span in collector.spans:
        by_name[span.service, span.name].append(span)
    assert {name: len(spans) for name, spans in by_name.items()} == {
        ("outrider-learner", "learner.group"): 1,
        ("outrider-learner", "learner.prepare"): 1,
        ("outrider-learner", "learner.rollout"): 1,
        ("outrider-learner", "learner.rewards"): 1,
        ("outrider-learner", GENERATE): 1,
        ("my-actor", GENERATE): 1,
        ("my-actor", "actor.queue"): 1,
        ("my-actor", "actor.generate"): 1,
        ("outrider-learner", "learner.weight_update"): 1,
        **{
            (service, f"weights.v1.WeightService/{name}"): 1
            for service in ("outrider-learner", "my-actor")
            for name in ("Stage", "Commit")
        },
    }
    only = {name: spans[0] for name, spans in by_name.items()}
    chain = [only["outrider-learner", name] for name in ("learner.group", "learner.rollout", GENERATE)]
    chain += [only["my-actor", GENERATE], only["my-actor", "actor.generate"]]
    _check_chain(chain)
    queue, generate = only["my-actor", "actor.queue"], only["my-actor", "actor.generate"]
    assert queue.parent == generate.parent
    assert queue.end_ns == generate.start_ns
    assert queue.end_ns - queue.start_ns >= 0.05e9  # the fake engine's first_token_s
    longest = max(len(completion.token_ids) for completion in group.completions)
    assert generate.end_ns - generate.start_ns >= (longest - 1) * 0.01e9
    for name in ("Stage", "Commit"):
        update = only["outrider-learner", "learner.weight_update"]
        _check_chain(
            [update, *(only[who, f"weights.v1.WeightService/{name}"] for who in ("outrider-learner", "my-actor"))]
        )
        assert update.attributes["outrider.policy_version"] == 1
    assert not any(span.is_error for span in collector.spans)


def _check_chain(chain: list[Received]) -> None:
    """Each span is the child of the one before, in one trace, and within its time."""
    assert chain[0].parent == b""
    for parent, child in itertools.pairwise(chain):
        assert (child.trace, child.parent) == (parent.trace, parent.span)
        assert parent.start_ns <= child.start_ns <= child.end_ns <= parent.end_ns


# ------------------------------------------------------------------------------------------- in this process

IMAGE = MediaItem(content_hash(png()), png())


def request(**sampling: Any) -> RolloutRequest:
    return RolloutRequest("g", TextPrompt("?"), (IMAGE,), SamplingParams(**({"n": 2, "max_tokens": 3} | sampling)))


async def _ended(memory: InMemorySpanExporter, stop: Callable[[], None]) -> dict[str, Any]:
    await asyncio.to_thread(stop)
    return {span.name + (".client" if span.kind.name == "CLIENT" else ""): span for span in memory.get_finished_spans()}


async def test_media_are_decoded_within_the_call(start_actor: StartActor) -> None:
    """A caller that traces nothing: the trace begins on the actor, and polls are none."""
    memory = InMemorySpanExporter()
    stop = tracing.start("test", memory)
    actor = await start_actor(fake={"token_s": 0.0})
    client = GrpcClient(actor.address)
    await client.status()
    await client.generate(request(), timeout_s=10)
    await client.close()
    spans = await _ended(memory, stop)
    assert spans.keys() == {GENERATE, "actor.decode_media", "actor.queue", "actor.generate"}
    received = spans[GENERATE]
    assert received.parent is None
    assert spans["actor.decode_media"].parent.span_id == received.context.span_id
    assert spans["actor.decode_media"].attributes == {"outrider.num_items": 1}


async def test_a_refusal_is_an_error_on_both_ends(start_actor: StartActor) -> None:
    memory = InMemorySpanExporter()
    stop = tracing.start("test", memory)
    actor = await start_actor()
    client = GrpcClient(actor.address)
    with pytest.raises(InvalidRequest), tracing.span("caller"):
        await client.generate(request(n=10**6), timeout_s=10)
    await client.close()
    spans = await _ended(memory, stop)
    assert spans[GENERATE].status.status_code.name == "ERROR"
    assert spans[GENERATE].status.description == "InvalidRequest"
    sent = spans[f"{GENERATE}.client"]
    assert (sent.status.status_code.name, sent.attributes["rpc.grpc.status_code"]) == ("ERROR", 3)
    assert spans[GENERATE].parent.span_id == sent.context.span_id
    assert sent.parent.span_id == spans["caller"].context.span_id


async def test_nothing_is_traced_by_default(start_actor: StartActor) -> None:
    actor = await start_actor()
    client = GrpcClient(actor.address)
    with tracing.span("caller") as span:
        assert span is None
        await client.generate(request(), timeout_s=10)
    await client.close()


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        ConfigError, match=r"tracing: opentelemetry\.sdk\.trace is not installed; pip install -e '\.\[otel\]'"
    ):
        tracing.start("test")
