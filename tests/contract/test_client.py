"""The learner's client against a real server with the fake engine, and against servers that break the contract."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import numpy as np
import pytest

from common import wire
from common.client import GrpcClient
from common.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MalformedResponse,
    MediaMissing,
    QueueFull,
    StaleEpoch,
    TooLarge,
    Unreachable,
    WeightsPending,
)
from common.media import content_hash
from common.pb.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from common.pb.weights.v1 import weights_pb2, weights_pb2_grpc
from common.types import (
    ActorState,
    ChatMessage,
    Completion,
    EpochSpec,
    Manifest,
    ManifestBucket,
    ManifestParameter,
    MediaPart,
    PromptInfo,
    RolloutRequest,
    SamplingParams,
    ServerInfo,
    TextPart,
)
from common.wire import manifest_to_proto
from learner.rollouts.sampler import build_request
from learner.types import PromptSample
from tests.helpers.fake_actors import StartActor, png
from tests.helpers.fakes import make_completion, until

IMAGES = (png(1), png(2))
MESSAGES = (ChatMessage("user", (MediaPart(0), TextPart("or"), MediaPart(1), TextPart("?"))),)


def request(n: int = 3, images: tuple[bytes, ...] = IMAGES, **sampling: Any) -> RolloutRequest:
    return build_request("g", PromptSample(0, MESSAGES, images, None), SamplingParams(n=n, **sampling))


class Recorder(GrpcClient):
    """Remembers which media each call carried: True for bytes, False for a hash only."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(address, **options)
        self.sent: list[list[bool]] = []
        self.uploads: list[int] = []
        self.upload_timeouts_s: list[float] = []

    def stream(
        self, request: RolloutRequest, *, timeout_s: float
    ) -> AsyncGenerator[PromptInfo | list[Completion], None]:
        self.sent.append([item.encoded is not None for item in request.media])
        return super().stream(request, timeout_s=timeout_s)

    async def upload(self, items: Any, *, timeout_s: float = 60.0) -> None:
        self.uploads.append(len(items))
        self.upload_timeouts_s.append(timeout_s)
        await super().upload(items, timeout_s=timeout_s)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Recorder]]:
    clients: list[Recorder] = []

    def make(address: str, **options: Any) -> Recorder:
        clients.append(Recorder(address, **options))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


async def test_a_group_comes_whole_and_in_order(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    client = connect((await start_actor()).address)
    sampled = await client.generate(request(n=20), timeout_s=10)
    assert sampled.prompt.group_id == "g"
    assert sampled.prompt.actor_id == "actor-1"
    assert tuple(use.sha256 for use in sampled.prompt.media) == tuple(map(content_hash, IMAGES))
    assert [completion.index for completion in sampled.completions] == list(range(20))
    assert len({completion.trajectory_id for completion in sampled.completions}) == 20


async def test_messages_may_be_as_large_as_is_said(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    address = (await start_actor()).address
    upload = bytes(2**20)  # one chunk
    with pytest.raises(TooLarge, match="larger than max"):
        await connect(address, max_message_bytes=2**20).put_media([upload])
    with pytest.raises(InvalidRequest):  # it came, and is no image
        await connect(address, max_message_bytes=2**21).put_media([upload])


async def test_an_image_crosses_once_per_actor(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    client = connect((await start_actor()).address)
    for images in (IMAGES, IMAGES, (IMAGES[1], png(3))):
        await client.generate(request(images=images), timeout_s=10)
    assert client.sent == [[True, True], [False, False], [False, True]]
    client.forget_media()
    await client.generate(request(), timeout_s=10)
    assert client.sent[-1] == [True, True]


async def test_media_that_the_actor_lost_are_sent_again(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    client = connect((await start_actor()).address)
    # It believes that the actor holds both.
    client._known_media.remember(item.sha256 for item in request().media)
    sampled = await client.generate(request(), timeout_s=10)
    assert client.sent == [[False, False], [True, True]]
    assert len(sampled.completions) == 3


async def test_media_without_bytes_are_asked_for_once(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    client = connect((await start_actor()).address)
    bare = RolloutRequest("g", request().prompt, tuple(type(m)(m.sha256) for m in request().media))
    with pytest.raises(MediaMissing) as caught:
        await client.generate(bare, timeout_s=10)
    assert set(caught.value.sha256s) == set(map(content_hash, IMAGES))
    assert len(client.sent) == 2


async def test_large_media_are_uploaded_in_chunks(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    big = png(4, size=700)
    assert len(big) > 2 * 512 * 1024
    client = connect((await start_actor()).address)
    sampled = await client.generate(request(images=(big, IMAGES[0])), timeout_s=10)
    assert (client.uploads, client.sent) == ([2], [[False, False]])
    assert client.upload_timeouts_s == [10]
    assert sampled.prompt.media[0].sha256 == content_hash(big)


async def test_a_burst_that_the_store_cannot_hold_is_answered(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    """Each pushes the others out before it is asked for by hash: nobody is refused for that."""
    images = [png(i, size=160) for i in range(64)]
    actor = await start_actor(limits={"media_store_bytes": sum(map(len, images)) // 3}, fake={"token_s": 0.01})
    client = connect(actor.address, inline_max_bytes=0)
    groups = [request(images=tuple(images[i : i + 2])) for i in range(0, 64, 2)]
    answers = await asyncio.gather(*(client.generate(group, timeout_s=20) for group in groups), return_exceptions=True)
    assert client.sent.count([True, True]) > 0  # otherwise it held them
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(error, QueueFull) and "uploads of" in error.message for error in refused)  # too many at once
    assert len(refused) < 16


async def test_images_that_the_store_cannot_take_in_side_by_side_come_with_the_request(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    """Their own group would keep each other out at each try, for ever."""
    images = (png(1, size=900), png(2, size=900))
    actor = await start_actor(limits={"media_store_bytes": max(map(len, images)) * 5 // 4})
    client = connect(actor.address, inline_max_bytes=0)
    sampled = await client.generate(request(images=images), timeout_s=10)
    assert len(sampled.completions) == 3
    assert client.sent == [[True, True]]


async def test_media_that_fit_neither_store_nor_message_are_missing_at_the_second_try(
    start_actor: StartActor, connect: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a moment's trouble: a group that pushes its own uploads out must end."""
    images = (png(1, size=700), png(2, size=700))
    actor = await start_actor(limits={"max_message_bytes": sum(map(len, images))})  # and the rest of the request
    client = connect(actor.address)
    monkeypatch.setattr(actor.server._rollouts._intake._store, "get", {}.get)
    with pytest.raises(MediaMissing):
        await client.generate(request(images=images), timeout_s=10)
    assert client.uploads == [2, 2]
    small = request()
    client._known_media.remember(item.sha256 for item in small.media)
    await client.generate(small, timeout_s=10)
    assert client.sent == [[False, False], [False, False], [False, False], [True, True]]


async def test_a_file_named_twice_counts_twice_in_a_message(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    image = png(1, size=500)
    client = connect((await start_actor()).address)
    prepared = await client._prepare(request(images=(image, image)), 10, inline_max_bytes=2 * len(image) - 1)
    assert client.uploads == [1]
    assert [item.content for item in prepared.media] == [None, None]


async def test_where_the_first_group_fails_one_other_sends_the_image(
    start_actor: StartActor, connect: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect((await start_actor(fake={"token_s": 0.01})).address)
    collect, fails = client._collect, iter([True])

    async def fail_once(*arguments: Any) -> Any:
        await asyncio.sleep(0.05)
        if next(fails, False):
            raise Unreachable("gone")
        return await collect(*arguments)

    monkeypatch.setattr(client, "_collect", fail_once)
    groups = [request() for _ in range(6)]
    answers = await asyncio.gather(*(client.generate(group, timeout_s=10) for group in groups), return_exceptions=True)
    assert [type(answer) for answer in answers if isinstance(answer, BaseException)] == [Unreachable]
    assert client.sent.count([True, True]) == 1


async def test_groups_of_one_image_send_it_once(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    client = connect((await start_actor(fake={"token_s": 0.01})).address)
    await asyncio.gather(*(client.generate(request(), timeout_s=10) for _ in range(16)))
    assert sorted(client.sent) == [[False, False]] * 15 + [[True, True]]


async def test_those_that_wait_for_media_send_them_where_the_first_fails(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    client = connect((await start_actor()).address)
    first = asyncio.create_task(client.generate(request(n=100_000), timeout_s=10))
    others = [asyncio.create_task(client.generate(request(), timeout_s=10)) for _ in range(3)]
    with pytest.raises(InvalidRequest):
        await first
    assert [len((await other).completions) for other in others] == [3, 3, 3]
    assert not client._known_media._being_sent


async def test_media_of_a_group_that_is_broken_off_are_not_sent_again(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    client = connect((await start_actor(fake={"first_token_s": 60.0})).address)
    hashes = [item.sha256 for item in request().media]
    call = asyncio.create_task(client.generate(request(), timeout_s=60))
    await until(lambda: client.holds(hashes))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert client.holds(hashes)


async def test_an_upload_is_not_repeated_for_a_request_that_is_refused(
    start_actor: StartActor, connect: Callable[..., Recorder]
) -> None:
    client = connect((await start_actor(standalone=False)).address, inline_max_bytes=0)
    for _ in range(2):
        with pytest.raises(WeightsPending):
            await client.generate(request(), timeout_s=10)
    assert client.uploads == [2]


async def test_status_and_info(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    client = connect((await start_actor()).address)
    status = await client.status()
    assert (status.actor_id, status.state, status.policy_version) == ("actor-1", ActorState.SERVING, 0)
    info = await client.server_info()
    assert (info.actor_id, info.engine, info.limits.max_group_size) == ("actor-1", "fake", 256)


async def test_errors_arrive_as_what_they_are(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    client = connect((await start_actor(standalone=False)).address)
    with pytest.raises(WeightsPending):
        await client.generate(request(), timeout_s=10)
    parameter = ManifestParameter("w", "F32", (2,), 0, 0)
    manifest = Manifest(1, (parameter,), (ManifestBucket(8, 0),), updates_vision=False)
    with pytest.raises(StaleEpoch):
        await client.stage("run", 1, manifest, timeout_s=5)
    with pytest.raises(StaleEpoch):
        await client.commit("run", 1, 1, timeout_s=5)
    await client.abort("run", 1)


async def test_bad_fields_are_named(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    client = connect((await start_actor()).address)
    with pytest.raises(InvalidRequest) as caught:
        await client.generate(request(n=100_000), timeout_s=10)
    assert caught.value.field == "sampling.n"


async def test_a_manifest_is_made_once_for_all_actors_of_an_update(
    connect: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 18,000 parameters that holds the learner's loop up for 50 ms."""
    sent: list[tuple[str, Manifest]] = []

    class Stage(weights_pb2_grpc.WeightServiceServicer):
        async def Stage(self, request: Any, context: Any) -> Any:  # noqa: N802 - its name in the service
            sent.append((request.run_id, wire.manifest_from_proto(request.manifest)))
            return weights_pb2.StageResponse()

    def counted(manifest: Manifest) -> weights_pb2.Manifest:
        made.append(manifest.policy_version)
        return manifest_to_proto(manifest)

    made: list[int] = []
    monkeypatch.setattr(wire, "manifest_to_proto", counted)
    server = grpc.aio.server()
    weights_pb2_grpc.add_WeightServiceServicer_to_server(Stage(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    clients = [connect(f"127.0.0.1:{port}") for _ in range(3)]
    updates = [
        Manifest(
            version, (ManifestParameter("w", "F32", (4,), 0, 0),), (ManifestBucket(16, None),), updates_vision=False
        )
        for version in (1, 2)
    ]
    for update in (*updates, updates[0]):
        await asyncio.gather(*(client.stage(f"run-{i}", 1, update, timeout_s=10) for i, client in enumerate(clients)))
    await server.stop(None)
    expected = [(f"run-{i}", update) for update in (*updates, updates[0]) for i in range(3)]
    assert sorted(sent, key=lambda said: said[0]) == sorted(expected, key=lambda said: said[0])
    assert made == [1, 2, 1]


async def test_nobody_there(connect: Callable[..., Recorder]) -> None:
    client = connect("127.0.0.1:1")
    with pytest.raises(Unreachable):
        await client.status()
    with pytest.raises(Unreachable):
        await client.generate(request(), timeout_s=5)


async def test_a_deadline_ends_the_call(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    actor = await start_actor(fake={"first_token_s": 60.0})
    with pytest.raises(DeadlineExceeded):
        await connect(actor.address).generate(request(), timeout_s=0.2)


async def test_the_deadline_of_a_group_is_for_all_that_it_takes(
    start_actor: StartActor, connect: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for what others send, the upload, and a second try, too: not each of them."""
    actor = await start_actor()
    client = connect(actor.address, inline_max_bytes=0)

    async def upload(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(client, "upload", upload)
    with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
        await client.generate(request(), timeout_s=0.2)


async def test_cancelling_frees_the_engine(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    actor = await start_actor(fake={"first_token_s": 60.0})
    call = asyncio.ensure_future(connect(actor.address).generate(request(), timeout_s=60))
    await until(lambda: actor.engine.load().num_running >= 3)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await until(lambda: not actor.engine.load().num_running)


async def test_a_connection_may_take_its_time(start_actor: StartActor, connect: Callable[..., Recorder]) -> None:
    """Half a second until the first byte of the server comes, as it does over TLS and a long way."""
    host, _, port = (await start_actor()).address.rpartition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(host, int(port))
        up = asyncio.create_task(pump(reader, to_server))
        await asyncio.sleep(0.5)
        await pump(from_server, writer)
        up.cancel()

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    client = connect(f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    assert (await client.status(timeout_s=10)).actor_id == "actor-1"
    await client.close()
    proxy.close()


# ------------------------------------------------------------------------------------------- servers that lie

PROMPT = PromptInfo("g", "liar", np.zeros(0, np.int32), np.array([2, 3], np.int32))
TWO = [make_completion("g", i, "liar") for i in range(2)]


def with_logprob(value: float) -> Completion:
    return dataclasses.replace(TWO[0], logprobs=np.full(len(TWO[0].token_ids), value, np.float32))


def named(completion: Completion, trajectory_id: str) -> Completion:
    return dataclasses.replace(completion, trajectory_id=trajectory_id)


async def serve(events: list[Any]) -> tuple[grpc.aio.Server, str]:
    class Liar(rollout_pb2_grpc.RolloutServiceServicer):
        GetServerInfo = PutMedia = None  # type: ignore[assignment]

        async def Generate(  # noqa: N802
            self, request: rollout_pb2.GenerateRequest, context: Any
        ) -> AsyncIterator[rollout_pb2.GenerateResponse]:
            for event in events:
                yield wire.response_to_proto(event)

    server = grpc.aio.server()
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(Liar(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "0 of 2 completions came before the end"),
        ([PROMPT, TWO[:1]], "1 of 2 completions came before the end"),
        ([TWO], "2 of 2 completions came before the end"),
        ([PROMPT, PROMPT, TWO], "a prompt message for 'g'"),
        ([PROMPT, TWO, TWO[:1]], "completion 0: came twice, as g/0/liar"),
        ([PROMPT, [TWO[0], named(TWO[1], "g/0/liar")]], "completion 1: is named 'g/0/liar'"),
        ([PROMPT, [TWO[0], named(TWO[1], "f/1/liar")]], "completion 1: is named 'f/1/liar'"),
        ([PROMPT, [make_completion("g", 2, "liar")]], "completion 2: only 2 were asked for"),
        ([PROMPT, [make_completion("g", 0, "liar", ())]], "completion 0: has no tokens"),
        ([PROMPT, [with_logprob(np.nan)]], "completion 0: has a logprob that is not finite"),
        ([PROMPT, [with_logprob(0.5)]], "completion 0: has a logprob above 0"),
    ],
)
async def test_an_answer_that_is_not_whole_is_no_answer(
    events: list[Any], message: str, connect: Callable[..., Recorder]
) -> None:
    server, address = await serve(events)
    try:
        with pytest.raises(MalformedResponse, match=message):
            await connect(address).generate(request(n=2), timeout_s=10)
    finally:
        await server.stop(None)


class Mute(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Answers nothing."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self.num_calls += 1
        await asyncio.Event().wait()


async def test_a_connection_that_is_closed_under_its_calls_fails_them(connect: Callable[..., Recorder]) -> None:
    """Nobody has cancelled them: a TaskGroup says nothing of a task that ends as cancelled, and what it did is lost."""
    mute = Mute()
    server = grpc.aio.server(interceptors=[mute])
    client = connect(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    calls = [
        asyncio.create_task(client.generate(request(), timeout_s=60)),
        asyncio.create_task(client.upload({b"sha": b"file"})),
        asyncio.create_task(client.status(timeout_s=60)),
    ]
    await until(lambda: mute.num_calls == len(calls))
    await client.close()
    for call in calls:
        with pytest.raises(Unreachable, match="the connection was closed"):
            await call
    await server.stop(None)


EVERY_CALL: dict[str, Callable[[GrpcClient], Coroutine[Any, Any, Any]]] = {
    "generate": lambda client: client.generate(request(), timeout_s=5),
    "upload": lambda client: client.upload({b"sha": b"file"}),
    "server_info": lambda client: client.server_info(),
    "status": lambda client: client.status(),
    "open_epoch": lambda client: client.open_epoch(EpochSpec("run", 1, "127.0.0.1", 1, 2, 1, "gloo", 5.0)),
    "stage": lambda client: client.stage("run", 1, Manifest(1, (), (), updates_vision=False), timeout_s=5),
    "commit": lambda client: client.commit("run", 1, 1, timeout_s=5),
    "abort": lambda client: client.abort("run", 1),
}


@pytest.mark.parametrize("name", EVERY_CALL)
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_is_closed_reaches_nobody(
    start_actor: StartActor, connect: Callable[..., Recorder], name: str, begun: bool
) -> None:
    """Its actor has left while an update or a group was about to ask it: that is no mistake in our own code.

    `begun`: its call has been made, and is not on its way yet.
    """
    client = connect((await start_actor()).address)
    if not begun:
        await client.close()
    call = asyncio.create_task(EVERY_CALL[name](client))
    if begun:
        await asyncio.sleep(0)  # its first step
        await client.close()
    with pytest.raises(Unreachable, match="the connection was closed"):
        await call


class Garbage(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers every call with bytes that are no message."""

    def service(self, handler_call_details: Any) -> Any:
        name = handler_call_details.method.rpartition("/")[2]
        if name == "Generate":
            return grpc.unary_stream_rpc_method_handler(self._stream)
        if name == "PutMedia":
            return grpc.stream_unary_rpc_method_handler(self._answer)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, _request: Any, _context: Any) -> bytes:
        return b"\xff\xff\xff"

    async def _stream(self, request: Any, context: Any) -> None:
        await context.write(await self._answer(request, context))


@pytest.mark.parametrize("name", EVERY_CALL)
async def test_bytes_that_do_not_parse_are_a_malformed_response(connect: Callable[..., Recorder], name: str) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([Garbage()])
    client = connect(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    with pytest.raises(MalformedResponse, match="no message of its kind"):
        await EVERY_CALL[name](client)
    await server.stop(None)


async def test_the_second_try_sends_what_another_group_has_sent_meanwhile(
    start_actor: StartActor, connect: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect((await start_actor()).address)
    sha256s = [item.sha256 for item in request().media]
    client._known_media.remember(sha256s)
    info = client.server_info

    async def server_info(**options: float) -> ServerInfo:
        client._known_media.remember(sha256s)  # which the actor may have lost again
        return await info(**options)

    monkeypatch.setattr(client, "server_info", server_info)
    await client.generate(request(), timeout_s=10)
    assert client.sent == [[False, False], [True, True]]
